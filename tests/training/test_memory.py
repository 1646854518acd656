import mmap

import pytest
import torch

from lit_rlhf.training import memory
from lit_rlhf.training.memory import Peak, resident_bytes


def test_the_peak_is_remembered_and_can_begin_anew():
    peak = Peak()
    before = resident_bytes()
    # 64 MiB of the system's own, each page written to: the heap may have freed pages at hand, which are resident.
    with mmap.mmap(-1, 2**26) as block:
        torch.frombuffer(block, dtype=torch.uint8).fill_(1)
        assert resident_bytes() - before > 0.9 * 2**26
    begun, most = peak.measure()
    assert abs(begun - before) < 2**22 and most - begun > 0.9 * 2**26
    if peak.anew:
        begun, most = Peak().measure()
        assert most - begun < 2**25


@pytest.mark.skipif(not memory.STATUS.is_file(), reason="only Linux says both")
def test_a_peak_that_the_system_counts_some_pages_short_is_not_below_the_beginning(monkeypatch):
    peak = Peak()
    says = memory._status
    monkeypatch.setattr(memory, "_status", lambda name: says("VmRSS") // 2 if name == "VmHWM" else says(name))
    begun, most = peak.measure()
    assert begun == most


def test_systems_without_files_on_processes_say_it_otherwise(monkeypatch, tmp_path):
    there = resident_bytes(), Peak().measure()
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    assert abs(resident_bytes() - there[0]) < 2**23  # counted more roughly
    assert Peak().measure()[1] >= there[1][0] - 2**23
    assert memory.machine_bytes() > resident_bytes()
