"""Checkpoints go to disk as they are, whole or not at all."""

import resource
import sys

import pytest
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_rlhf.training import make_trainer
from lit_rlhf.training.checkpoint_files import CheckpointFiles, read_checkpoint
from lit_rlhf.training.memory import Peak
from lit_rlhf.training.torch_file import write_whole

MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux measures a peak anew")


def checkpoint(mib):
    return {"state_dict": {"w": torch.arange(mib * MIB // 4, dtype=torch.float32)}, "epoch": 3}


def test_what_was_written_is_read(tmp_path):
    write_whole(checkpoint(1), tmp_path / "folder" / "last.ckpt")
    found = read_checkpoint(tmp_path / "folder" / "last.ckpt")
    assert found["epoch"] == 3 and torch.equal(found["state_dict"]["w"], checkpoint(1)["state_dict"]["w"])
    plain = torch.load(tmp_path / "folder" / "last.ckpt", weights_only=True)
    assert torch.equal(plain["state_dict"]["w"], found["state_dict"]["w"])
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["last.ckpt"]


def test_what_was_read_can_be_changed_while_the_file_is_replaced(tmp_path):
    write_whole(checkpoint(1), tmp_path / "last.ckpt")
    found = read_checkpoint(tmp_path / "last.ckpt")
    found["state_dict"]["w"] += 1
    write_whole(found, tmp_path / "last.ckpt")
    again = read_checkpoint(tmp_path / "last.ckpt")
    assert torch.equal(again["state_dict"]["w"], checkpoint(1)["state_dict"]["w"] + 1)


@linux
def test_neither_writing_nor_reading_takes_a_second_copy(tmp_path):
    large = checkpoint(128)
    write_whole(checkpoint(1), tmp_path / "first.ckpt")  # what is imported and prepared then
    writing = Peak()
    write_whole(large, tmp_path / "last.ckpt")
    before, peak = writing.measure()
    assert peak - before < 16 * MIB
    reading = Peak()
    found = read_checkpoint(tmp_path / "last.ckpt")
    before, peak = reading.measure()
    assert peak - before < 16 * MIB
    assert found["state_dict"]["w"][-1] == large["state_dict"]["w"][-1]


def test_a_disk_that_is_full_leaves_the_file_before(tmp_path):
    write_whole(checkpoint(1), tmp_path / "last.ckpt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, limits[1]))
    try:
        with pytest.raises(OSError):
            write_whole(checkpoint(8), tmp_path / "last.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_checkpoint(tmp_path / "last.ckpt")["state_dict"]["w"].numel() == MIB // 4
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_trainers_write_so_unless_told_otherwise():
    quiet = {"logger": False, "enable_progress_bar": False}
    assert isinstance(make_trainer("cpu", **quiet).strategy.checkpoint_io, CheckpointFiles)

    class Own(TorchCheckpointIO):
        pass

    assert isinstance(make_trainer("cpu", plugins=[Own()], **quiet).strategy.checkpoint_io, Own)
