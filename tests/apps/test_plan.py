import json

from lit_rlhf.apps.plan import Need, Plan, duration
from lit_rlhf.training.trace import Rates

MIB = 2**20


def needed(stage="sft", **changes):
    sizes = {"weights": 4, "gradients": 4, "optimizer": 8, "cache": 0, "activations": 30, "checkpoint": 12, "data": 45}
    sizes = {name: size * MIB for name, size in sizes.items()} | {"peak": 1234 * MIB}
    return Need(**{"stage": stage, "unit": "step", "steps": 500, "step_seconds": 0.25, "seconds": 125.0, "flops": 1e9,
                   **sizes, **changes})  # fmt: skip


def test_the_table_says_it_in_mib_and_the_file_in_bytes(tmp_path):
    plan = Plan("cpu", "32-true", 2, Rates(100e9, 20e9, 2e-6), 465 * MIB, [needed()], {"reward": "no data"})
    head, row, _, *notes = plan.table().splitlines()
    assert head.split() == [
        "weights", "gradients", "optimizer", "cache", "activations", "checkpoint", "data", "peak", "a", "step", "steps",
        "in", "all",
    ]  # fmt: skip
    assert row.split() == ["sft", "4", "4", "8", "30", "12", "45", "1,234", "250", "ms", "500", "2", "min"]
    said = " ".join(notes)
    assert "2 threads" in said and "465 more" in said and "100 GFLOP/s" in said
    assert "reward: not planned: no data" in said
    plan.write(tmp_path / "run" / "plan.json")
    written = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert written["stages"][0]["peak"] == 1234 * MIB
    assert written["rates"] == {"flops": 100e9, "bytes": 20e9, "call": 2e-6}


def test_nothing_is_said_about_time_on_a_device_that_is_not_there():
    plan = Plan("cuda", "bf16-mixed", 1, None, MIB, [needed(step_seconds=None, seconds=None)], {})
    assert "There is no cuda here to measure" in plan.table()
    assert "All of it" not in plan.table()


def test_durations():
    said = [duration(s) for s in (None, 0.0421, 1.26, 99.0, 600.0, 7200.0)]
    assert said == ["", "42 ms", "1.3 s", "99.0 s", "10 min", "2.0 h"]
