"""Sweeps by Optuna: what is searched, and a study that is killed, goes on, fails in part and ends trials early."""

import csv
import os
import signal
import subprocess
import time

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from lit_rlhf.errors import UserError
from lit_rlhf.pipeline.optuna_sweeper import distribution, search_space


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ("interval(0.02,0.2)", FloatDistribution(0.02, 0.2)),
        ("tag(log,interval(1e-4,1e-2))", FloatDistribution(1e-4, 1e-2, log=True)),
        ("int(interval(1,8))", IntDistribution(1, 8)),
        ("range(1,9,2)", IntDistribution(1, 7, step=2)),
        ("range(0.0,1.0,0.25)", FloatDistribution(0.0, 0.75, step=0.25)),
        ("choice(gae,rloo)", CategoricalDistribution(["gae", "rloo"])),
        ("1,2,null", CategoricalDistribution([1, 2, "null"])),
        ("'a b',c", CategoricalDistribution(["'a b'", "c"])),
    ],
)
def test_each_form_of_a_search(values, expected):
    [override] = OverridesParser.create().parse_overrides([f"x={values}"])
    assert distribution(override) == expected


def test_what_all_trials_have_and_what_is_searched():
    fixed, space = search_space(["a=interval(0,1)", "b=1,2", "stage=sft", "a=interval(0,2)", "b=3"])
    assert fixed == ["b=3", "stage=sft"] and space == {"a": FloatDistribution(0, 2)}
    with pytest.raises(UserError, match="nothing is to be searched"):
        search_space(["stage=sft"])


def test_a_setting_that_is_none_is_named_before_the_first_trial(lit_rlhf, tmp_path):
    done = lit_rlhf(
        "-m", "stage=pretrain", "hydra/sweeper=optuna", "hydra.sweep.dir=s", "pretrain.data.nope=1,2", check=False
    )
    assert done.returncode == 2 and "nope" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("s/*/job.json"))


def test_pruning_outside_of_a_study_is_refused(lit_rlhf):
    done = lit_rlhf("stage=pretrain", "callbacks=pruning", "callbacks.pruning.monitor=val/pretrain/loss", check=False)
    assert (
        done.returncode == 2 and "callbacks=pruning: it ends trials of a sweep by hydra/sweeper=optuna" in done.stderr
    )


@pytest.mark.slow
def test_a_study_of_twelve_trials_that_is_killed(lit_rlhf, finished_run, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(finished_run / "runs" / "quickstart")
    settings = [
        "-m", "stage=sft", "from_run=quickstart", "run=swept", "hydra/sweeper=optuna", "hydra.sweep.dir=s",
        "hydra.sweeper.n_trials=12", "hydra.sweeper.direction=minimize", "sft.optimizer.lr=choice(1e-9,1e-3,3e-3,1e30)",
        "callbacks=pruning", "callbacks.pruning.monitor=val/sft/loss", "hydra.sweeper.pruner.n_startup_trials=2",
        "sft.trainer.val_check_interval=1", "sft.samples_every=1000", "sft.data.limit=48",
    ]  # fmt: skip
    process = subprocess.Popen(lit_rlhf.command(*settings), cwd=tmp_path, env=lit_rlhf.env, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 300
    while not (tmp_path / "s/3/sft").is_dir():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = lit_rlhf(*settings, check=False)
    assert "trials are in sqlite:///s/study.db; it goes on" in done.stdout + done.stderr
    trials = optuna.load_study(study_name="lit_rlhf", storage=f"sqlite:///{tmp_path}/s/study.db").trials
    states = {state: [t.number for t in trials if t.state == state] for state in TrialState}
    assert len(trials) == 12 and states[TrialState.COMPLETE] and states[TrialState.PRUNED]
    diverging = {t.number for t in trials if t.params["sft.optimizer.lr"] == 1e30}  # some are ended before
    assert set(states[TrialState.FAIL]) <= diverging and not diverging & {*states[TrialState.COMPLETE]}
    assert states[TrialState.FAIL] and done.returncode == 1, done.stderr
    assert all(f"job {number} failed" in done.stderr + done.stdout for number in states[TrialState.FAIL] if number > 3)
    rows = {int(row["job"]): row["status"] for row in csv.DictReader((tmp_path / "s/sweep.csv").open())}
    named = {TrialState.COMPLETE: "done", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    assert rows == {t.number: named[t.state] for t in trials}
    assert "best of" in done.stdout and (tmp_path / "s/study.png").is_file() and (tmp_path / "s/sweep.png").is_file()
