"""Checkpoint folders of sharded trainings: a damaged one is named, a full disk leaves the one before."""

import pickle
import resource
import shutil
from hashlib import sha256

import pytest
import torch
import torch.distributed as dist

from lit_rlhf.errors import UserError
from lit_rlhf.training.checkpoint_shards import INDEX, ShardsToCome, read_shards, write_shards

MIB = 2**20


@pytest.fixture(autouse=True)
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def checkpoint(numbers, step=1):
    moments = [{"param_groups": [{"lr": 1.0, "params": [0]}], "state": {0: {"exp_avg": torch.ones(numbers)}}}]
    return {"state_dict": {"w": torch.arange(numbers) / 7}, "optimizer_states": moments, "global_step": step}


def flipped(file):
    data = bytearray(file.read_bytes())
    at = data.find(b"\x92\x24") if file.suffix == ".distcp" else data.find(b"state_dict.w") + 11  # a weight; its name
    data[at] ^= 1
    file.write_bytes(data)


def folder_instead(file):
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("name", [INDEX, "__0_0.distcp", "rest.pt"])
def test_a_damaged_folder_is_named(name, tmp_path):
    whole = tmp_path / "whole" / "last.ckpt"
    whole.parent.mkdir()
    write_shards(checkpoint(1000), whole)
    assert torch.equal(read_shards(whole)["state_dict"]["w"], torch.arange(1000) / 7)
    damages = {
        "empty": lambda file: file.write_bytes(b""),
        "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        "other": lambda file: file.write_bytes(b"[1]\n"),
        "folder": folder_instead,
        "deleted": lambda file: file.unlink(),
        **({} if name == "rest.pt" else {"one bit": flipped}),
    }
    for damage, do in damages.items():
        folder = tmp_path / damage / "last.ckpt"
        shutil.copytree(whole, folder)
        do(folder / name)
        for into in (None, {"state_dict.w": torch.zeros(1000)}):
            with pytest.raises(UserError, match=r"last\.ckpt: damaged .*delete it: the same command then trains"):
                read_shards(folder, into)


class Call:
    def __reduce__(self):
        return print, ("called",)


def test_nothing_that_an_index_names_is_called(tmp_path, capsys):
    write_shards(checkpoint(10), tmp_path / "last.ckpt")
    body = pickle.dumps(Call())
    (tmp_path / "last.ckpt" / INDEX).write_bytes(body + sha256(body).digest())
    with pytest.raises(UserError, match=r"names builtins\.print"):
        read_shards(tmp_path / "last.ckpt")
    assert capsys.readouterr().out == ""


def written_beside(checkpoint, path):
    ShardsToCome(checkpoint, path, dist.new_group(backend="gloo")).place()


@pytest.mark.parametrize("write", [write_shards, written_beside])
def test_a_disk_that_is_full_leaves_the_folder_before(write, tmp_path):
    write(checkpoint(10), tmp_path / "last.ckpt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(checkpoint(MIB, step=2), tmp_path / "last.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_shards(tmp_path / "last.ckpt")["global_step"] == 1
