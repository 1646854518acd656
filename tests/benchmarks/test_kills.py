"""The whole pipeline under SIGKILL; `python benchmarks/kills.py` does hundreds."""

import random
from pathlib import Path

import kills
import pytest


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_kills_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(kills.__file__).parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    seconds = kills.whole(tmp_path / "whole", [])
    expected = kills.result(tmp_path / "whole" / "quickstart")
    assert len([name for name in expected if "safetensors" in name]) == 4 and "evaluate figures" in expected
    draw, done, chains = random.Random(0), 0, 0
    while done < 20 or chains < 2:
        done += kills.killed(tmp_path / str(chains), [], 12, seconds, draw)
        assert kills.differing(kills.result(tmp_path / str(chains) / "quickstart"), expected) == []
        chains += 1
