"""Two commands in turns: each counts the seconds in which it was at work."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

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
        "pretrain val_loss": 0.5,
        "sft val_loss": 0.4,
        "reward gold_accuracy": 0.9,
        "evaluate win_rate ppo_vs_sft mean": 0.8,
    }


def test_versions_are_compared_by_their_mean_over_the_seeds(tmp_path):
    [command] = commands(tmp_path, count=1)
    quickstart.in_turns([command], 5)
    laps = command.laps()

    def with_loss(loss):
        whole = laps[quickstart.WHOLE]
        return laps | {quickstart.WHOLE: replace(whole, watched=whole.watched | {"sft val_loss": loss})}

    two = quickstart.compare([{"now": with_loss(now), "before": with_loss(0.4)} for now in (0.3, 0.5)])
    assert all(len(side) == 2 for found, _ in two.values() for side in found.values())
    assert all(check.passed for check in two[quickstart.WHOLE][1])
    [one] = [
        c
        for c in quickstart.compare([{"now": with_loss(0.3), "before": with_loss(0.4)}])[quickstart.WHOLE][1]
        if not c.passed
    ]
    assert (one.what, one.ours, one.theirs) == ("mean sft val_loss", 0.3, 0.4)


def test_curves_of_runs_are_kept_side_by_side(tmp_path):
    [command] = commands(tmp_path, count=1)
    quickstart.in_turns([command], 5)
    for stage, names in quickstart.CURVES.items():
        rows = [f"step,{','.join(names)},other", f"0,{','.join('1' for _ in names)},", f"1,{',' * len(names)}7"]
        rows.append(f"2,{','.join('0.5' for _ in names)},")
        (command.run / stage / "metrics.csv").write_text("\n".join(rows))
    curves = command.curves()
    assert curves["ppo/kl"] == {"step": [0, 2], "value": [1, 0.5]}
    path = tmp_path / "out/curves.json"
    quickstart.store_curves({"now": curves, "before": curves}, "seed 2", path)
    known = quickstart.store_curves({"now": curves, "before": curves}, "seed 1", path)
    assert list(known) == ["seed 1", "seed 2"] and known["seed 2"]["before"] == curves
    quickstart.plot_curves(known, path.with_suffix(".svg"))
    assert "reward/accuracy" in path.with_suffix(".svg").read_text()


def test_commands_that_stand_still_end_with_the_script(ended, tmp_path):
    script = f"import sys, time; sys.path.insert(0, {str(Path(quickstart.__file__).parent)!r})\n"
    script += "import quickstart; from pathlib import Path\n"
    script += "command = quickstart.Command(['-c', 'import time; time.sleep(600)'], Path.cwd())\n"
    script += "print(command._process.pid, flush=True); time.sleep(600)"
    benchmark = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    with benchmark:
        command = int(benchmark.stdout.readline())
        assert Path(f"/proc/{command}").exists()
        benchmark.kill()
    ended(command)


def test_a_command_that_fails_says_what_it_said(tmp_path):
    [command] = commands(tmp_path, count=1, program="raise SystemExit('no disk')")
    with pytest.raises(RuntimeError, match="ended with 1: no disk"):
        quickstart.in_turns([command], 5)
    command.stop()


def test_seeds_are_rows_of_a_table_and_so_is_their_mean():
    found = {seed: dict.fromkeys(quickstart.OUTCOMES, value) for seed, value in (("3", 0.25), ("4", 0.75))}
    found["3"]["seconds"], found["4"]["seconds"] = 200.0, 301.0
    head, line, *rows = quickstart.seeds_table(found).splitlines()
    assert head.startswith("| seed | seconds | ") and head.count("|") == line.count("|") == 2 + len(quickstart.OUTCOMES)
    assert [row.split(" | ")[:3] for row in rows] == [
        ["| 3", "200", "0.250"], ["| 4", "301", "0.750"], ["| mean", "250", "0.500"]
    ]  # fmt: skip
