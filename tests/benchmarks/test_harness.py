"""Turns, ratios and checks; no other library is needed."""

import multiprocessing
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import harness
import page
import pytest
import torch
from harness import Check, Lap, Work, WorkDiffersError, alike, interleave, load, result, store


@dataclass(frozen=True)
class Case:
    laps: int = 3


def laps(*seconds, amount=10.0, steps=1, **watched):
    return [Lap(s, s / 2, amount, steps, watched) for s in seconds]


WORK = Work("rollout", "tokens/s", {"S": Case(), "L": Case()}, lambda *_: None)
FOUND = {"lit_rlhf": laps(1.0, 2.0, 5.0), "TRL": laps(2.0, 10.0, 4.0)}


def test_sides_take_turns_and_warm_up_is_dropped(tmp_path):
    log = tmp_path / "order"

    def side(name):
        def work(end_lap):
            for number in range(4):
                with log.open("a") as file:
                    file.write(name)
                end_lap(number, loss=float(number))

        return work

    found = interleave({"a": side("a"), "b": side("b")}, laps=3, warmup=1)
    assert log.read_text() == "baabbaab"  # who begins changes
    assert [lap.amount for lap in found["a"]] == [1, 2, 3]
    assert found["b"][0].watched == {"loss": 1.0}


def test_each_side_has_all_threads_in_a_process_of_its_own():
    def side(end_lap):
        for _ in range(2):
            end_lap(1, threads=torch.get_num_threads(), process=os.getpid())

    found = interleave({"a": side, "b": side}, laps=1, threads=2)
    watched = [lap.watched for side in found.values() for lap in side]
    assert [w["threads"] for w in watched] == [2, 2]
    assert len({os.getpid(), *(w["process"] for w in watched)}) == 3


def test_each_side_counts_its_own_optimizer_steps():
    def side(steps):
        def work(end_lap):
            parameter = torch.nn.Parameter(torch.ones(1))
            optimizer = torch.optim.SGD([parameter], lr=0.1)
            for _ in range(3):
                for _ in range(steps):
                    parameter.grad = torch.ones(1)
                    optimizer.step()
                end_lap(1)

        return work

    found = interleave({"a": side(1), "b": side(2)}, laps=2)
    assert [[lap.optimizer_steps for lap in side] for side in found.values()] == [[1, 1], [2, 2]]
    with pytest.raises(WorkDiffersError, match="optimizer steps: 2 here, 4 there"):
        harness.check_equal(alike(found))


def test_a_lap_may_begin_late():
    def work(end_lap):
        for _ in range(2):
            torch.randn(600, 600) @ torch.randn(600, 600)
            end_lap(1, since=harness.clock())

    def other(end_lap):
        for _ in range(2):
            torch.randn(600, 600) @ torch.randn(600, 600)
            end_lap(1)

    found = interleave({"a": work, "b": other}, laps=1)
    assert found["a"][0].seconds < found["b"][0].seconds


def test_an_error_of_a_side_is_raised():
    def broken(end_lap):
        end_lap(1)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken") as caught:
        interleave({"a": broken, "b": lambda end_lap: [end_lap(1) for _ in range(3)]}, laps=2)
    assert "in broken" in caught.value.__notes__[0]  # where it was raised
    assert not multiprocessing.active_children()


def test_a_process_that_dies_is_an_error():
    def dying(end_lap):
        end_lap(1)
        os._exit(3)

    with pytest.raises(RuntimeError, match="the process of a ended with 3"):
        interleave({"a": dying, "b": lambda end_lap: [end_lap(1) for _ in range(3)]}, laps=2)


SCRIPT = """
import os, signal
from harness import interleave

def side(end_lap):
    signal.signal(signal.SIGTERM, lambda *_: None)  # as trainers do
    while True:
        print(os.getpid(), flush=True)
        end_lap(1)

interleave({"a": side, "b": side}, 10**9)
"""


def test_sides_end_when_the_benchmark_is_killed(ended):
    benchmark = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True, cwd=Path(harness.__file__).parent
    )
    with benchmark:
        sides = {int(benchmark.stdout.readline()) for _ in range(8)}
        benchmark.kill()
    assert len(sides) == 2
    ended(*sides)


def test_a_side_that_ends_early_is_an_error():
    def short(end_lap):
        end_lap(1)

    with pytest.raises(RuntimeError, match="a has ended before its last lap"):
        interleave({"a": short, "b": lambda end_lap: [end_lap(1) for _ in range(4)]}, laps=3)


def test_medians_and_ratios_by_hand():
    found = result(WORK, "S", 1, FOUND, alike(FOUND))
    # rates 10, 5, 2 and 5, 1, 2.5: medians 5 and 2.5
    assert found.sides["lit_rlhf"] == harness.Rate(5.0, 2.0, 10.0, 3)
    assert found.sides["TRL"] == harness.Rate(2.5, 1.0, 5.0, 3)
    assert found.ratio == 2.0
    assert found.ratio_range == (0.8, 5.0)  # of the turns: 2, 5, 0.8
    assert found.cpu_ratio == 2.0
    assert found.processor_share == 0.5
    assert "rollout, S (50%)" in page.shared_core([found])
    assert found.settings == {"laps": 3}
    assert found.peer == "TRL"


@pytest.mark.parametrize(
    ("theirs", "what"),
    [
        (laps(2.0, 10.0, 4.0, steps=2, loss=1.0), "optimizer steps"),
        (laps(2.0, 10.0, 4.0, amount=9.0, loss=1.0), "amount of work"),
        (laps(2.0, 10.0, 4.0, loss=1.2), "mean loss"),
        (laps(2.0, 10.0, loss=1.0), "laps"),
    ],
)
def test_unequal_work_is_no_result(theirs, what):
    found = {"lit_rlhf": laps(1.0, 2.0, 5.0, loss=1.0), "TRL": theirs}
    with pytest.raises(WorkDiffersError, match=what):
        result(WORK, "S", 1, found, alike(found, loss=0.1))


def test_tolerance_is_relative_and_two_sided():
    assert Check("x", 11.0, 10.0, 0.1).passed and Check("x", 9.0, 10.0, 0.1).passed
    assert not Check("x", 11.1, 10.0, 0.1).passed and not Check("x", 8.9, 10.0, 0.1).passed
    assert not Check("x", float("nan"), 10.0, 0.1).passed


def test_results_are_kept_until_they_are_measured_anew(tmp_path):
    first = [result(WORK, case, 1, FOUND, alike(FOUND)) for case in ("L", "S")]
    path = store(first, ["S", "L"], tmp_path)
    assert load(path) == first[::-1]  # in the order of the cases
    faster = {**FOUND, "lit_rlhf": laps(0.5, 0.5, 0.5)}
    again = result(WORK, "S", 1, faster, alike(faster))
    two = result(WORK, "S", 2, FOUND, alike(FOUND))
    assert load(store([again, two], ["S", "L"], tmp_path)) == [again, first[0], two]
    assert load(tmp_path / "nothing.json") == []


def test_table_and_page(tmp_path):
    results = [result(WORK, "S", 1, FOUND, alike(FOUND))]
    assert "| S | 1 | 5 (2-10) | TRL 2.5 (1-5) | tokens/s | **2.00** (0.80-5.00) | 2.00 |" in harness.table(results)
    marks = page.BEGIN.format("rates", "page"), page.END.format("rates")
    text = "\n".join(("before", *marks, "after"))
    once = page.renewed(text, {"rates": harness.table(results)})
    assert once.startswith("before") and once.endswith("after") and "**2.00**" in once
    assert page.renewed(once, {"rates": harness.table(results)}) == once
    with pytest.raises(ValueError, match="no place for 'bars'"):
        page.renewed(text, {"bars": ""})
    harness.plot(results, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().count("<svg") == 1


def test_page_says_what_is_missed_and_lost():
    slow = {"lit_rlhf": laps(2.0), "bare PyTorch": laps(1.9)}
    work = Work("pretrain", "tokens/s", {"S": Case()}, lambda *_: None)
    lost = result(work, "S", 1, slow, alike(slow))
    assert page.marked(lost, page.Bar(0.97, 1)) == "**0.95** (0.95 by processor time), below the bar"
    assert "pretrain, S, 1 thread: 0.95 times as fast as bare PyTorch" in page.lost([lost])
    assert "| pretrain | L | | not measured | 0.97 | 1 |" in page.bars([lost])


def test_growth_changes_one_setting_at_a_time():
    @dataclass(frozen=True)
    class Sized:
        batch: int = 2
        width: int = 3
        laps: int = 9

    assert harness.vary(Sized(), 4, batch=(1, 8), width=(5,)) == {
        "batch 1": Sized(1, 3, 4),
        "batch 8": Sized(8, 3, 4),
        "width 5": Sized(2, 5, 4),
    }


def test_what_start_and_logging_cost():
    def side(unit, more):
        return {unit: {"median": 5.0, "lowest": 4.0, "highest": 6.0, "more": more}}

    found = {
        "start": {"sides": {"a step": side("wall", 0.5)}},
        "logging": {"sides": {"two figures": side("cpu", -0.1)}},
    }
    shown = page.overhead(found)
    assert "| a step | 5.00 (4.00-6.00) | +0.50 |" in shown and "| two figures | 5.00 (4.00-6.00) | -0.10 |" in shown
