"""Some of a run's files, damaged; `python benchmarks/damage.py` tries all."""

from pathlib import Path

import damage
import pytest


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_damage_is_named_or_repaired(tmp_path):
    command = damage.Warm(tmp_path)
    done = command(damage.SETTINGS, tmp_path)
    assert done.returncode == 0, done.stderr
    run = (tmp_path / "runs" / "quickstart").rename(tmp_path / "whole")
    expected, port = damage.result(run), damage.taken_port()
    chosen = list(damage.trials(run))[3::61]
    kinds = {".ckpt", ".safetensors", ".json", ".jsonl", ".csv", ".yaml"}
    assert {Path(trial.file).suffix for trial in chosen} >= kinds
    faults = [(trial, damage.try_one(trial, run, command, tmp_path, expected, port)) for trial in chosen]
    assert [(trial, fault) for trial, fault in faults if fault] == []
