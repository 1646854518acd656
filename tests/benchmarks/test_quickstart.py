"""Two commands in turns: each counts the seconds in which it was at work."""

import json
import time

import pytest
import quickstart

# Works for a third of a second a stage; what it has learned, it is told.
PROGRAM = """
import json, sys, time
from pathlib import Path
for stage in {stages}:
    begun = time.process_time()
    while time.process_time() - begun < 0.3:
        pass
    folder = Path("runs/quickstart") / stage
    folder.mkdir(parents=True)
    (folder / "done.json").write_text("{{}}")
Path("runs/quickstart/summary.json").write_text(sys.argv[1])
"""
LEARNED = {
    "pretrain": {"val_loss": 0.5},
    "sft": {"val_loss": 0.4},
    "reward": {"gold_accuracy": 0.9},
    "evaluate": {"win_rate": {"ppo_vs_sft": {"mean": 0.8}}},
}


def commands(folder, count=2, program=PROGRAM):
    made = []
    for number in range(count):
        place = folder / str(number)
        place.mkdir()
        (place / "program.py").write_text(program.format(stages=quickstart.STAGES[: 2 + 4 * (count == 1)]))
        made.append(quickstart.Command(["program.py", json.dumps(LEARNED)], place))
    return made


def test_only_the_seconds_at_work_count(tmp_path):
    begun = time.perf_counter()
    one, two = commands(tmp_path)
    quickstart.in_turns([one, two], 0.1)
    passed = time.perf_counter() - begun
    for command in (one, two):
        assert list(command.ended) == [*quickstart.STAGES[:2], quickstart.WHOLE]
        seconds = [s for s, _ in command.ended.values()]
        assert seconds == sorted(seconds) and seconds[-1] == command.worked
        assert command.ended["pretrain"][1] >= 0.25 and command.ended["sft"][1] >= 0.55  # of the processor
        assert command.ended["pretrain"][0] < 0.9 * passed  # while the other one worked, it stood still
    assert one.worked + two.worked <= passed


def test_laps_are_those_of_the_stages_and_of_the_whole(tmp_path):
    [command] = commands(tmp_path, count=1)
    quickstart.in_turns([command], 5)
    laps = command.laps()
    assert list(laps) == [*quickstart.STAGES, quickstart.WHOLE]
    assert sum(laps[stage].seconds for stage in quickstart.STAGES) == pytest.approx(command.ended["evaluate"][0])
    assert laps[quickstart.WHOLE].seconds == command.worked
    assert laps[quickstart.WHOLE].watched == {
        "pretrain, val_loss": 0.5, "sft, val_loss": 0.4, "reward, gold_accuracy": 0.9, "PPO wins against SFT": 0.8,
    }  # fmt: skip


def test_a_command_that_fails_says_what_it_said(tmp_path):
    [command] = commands(tmp_path, count=1, program="raise SystemExit('no disk')")
    with pytest.raises(RuntimeError, match="ended with 1: no disk"):
        quickstart.in_turns([command], 5)
    command.stop()
