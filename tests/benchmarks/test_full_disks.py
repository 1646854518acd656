"""Some writes that a disk refuses; `python benchmarks/full_disks.py` tries the first, a middle and the last of each."""

import full_disks
import pytest
from damage import Warm
from kills import SETTINGS


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_refused_write_is_one_line_and_the_same_command_then_goes_on(tmp_path):
    command = Warm(tmp_path)
    done = command(SETTINGS, tmp_path)
    assert done.returncode == 0, done.stderr
    finished = (tmp_path / "runs" / "quickstart").rename(tmp_path / "whole")
    for stage in ("preference", "evaluate", "sft"):
        disks = full_disks.Disks(tmp_path, finished, command, full_disks.STAGES[stage])
        cases = disks.cases()
        chosen = [(*cases[len(cases) * place // 6][:2], code) for place, code in zip((1, 3, 5), full_disks.CODES)]
        assert list(disks.go_through(chosen)) == chosen
