"""Sweeps by Optuna: what is searched, and a study that is killed, goes on, fails in part and ends trials early."""

import csv
import json
import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from types import SimpleNamespace

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from lit_rlhf.errors import UserError
from lit_rlhf.pipeline.optuna_sweeper import OptunaSweeper
from lit_rlhf.pipeline.search_space import distribution, outermost_jobs, search_space
from lit_rlhf.pipeline.stage_folder import held


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
        ("choice('a,b','[c]',[d,e])", CategoricalDistribution(["'a,b'", "'[c]'", "[d,e]"])),
        (
            "choice('1','null','1e-3',true,'true',a:b)",
            CategoricalDistribution(["'1'", "'null'", "'1e-3'", True, "'true'", "a:b"]),
        ),
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


@pytest.mark.parametrize(
    ("searched", "said"),
    [
        ("pretrain.data.nope=1,2", "pretrain.data.nope: there is no such setting"),
        ("pretrain.optimizer.lrr=interval(1e-4,1e-3)", "Did you mean pretrain.optimizer.lr"),
        ("pretrain.optimizer.lr=choice(1e-3,high)", "pretrain.optimizer.lr=high: it should be a valid number"),
        ("pretrain.optimizer.weight_decay=interval(-1,1)", "pretrain.optimizer.weight_decay=-1.0"),
    ],
)
def test_what_cannot_be_searched_is_named_before_the_first_trial(lit_rlhf, tmp_path, searched, said):
    study = "hydra/sweeper=optuna", "hydra.sweep.dir=s", "hydra.sweeper.direction=minimize"
    done = lit_rlhf("-m", "stage=pretrain", *study, "pretrain.seed=1,2,3", searched, check=False)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("s/*/job.json"))


def test_each_value_of_a_list_and_both_ends_of_an_interval_are_checked():
    jobs = outermost_jobs(["stage=sft", "a=1,2,3", "b=interval(0,1)", "c=range(1,9,2)"])
    assert jobs == [
        ["stage=sft", "a=1", "b=0.0", "c=1"],
        ["stage=sft", "a=2", "b=1.0", "c=7"],
        ["stage=sft", "a=3", "b=0.0", "c=1"],
    ]


def test_pruning_outside_of_a_study_is_refused(lit_rlhf):
    done = lit_rlhf("stage=pretrain", "callbacks=pruning", "callbacks.pruning.monitor=val/pretrain/loss", check=False)
    assert (
        done.returncode == 2 and "callbacks=pruning: it ends trials of a sweep by hydra/sweeper=optuna" in done.stderr
    )


class Launcher:
    """Stands in for Hydra's: each job ends at once, and writes what a job writes; one is killed."""

    def __init__(self, folder, killed):
        self.folder, self.killed, self.begun = folder, killed, []

    def launch(self, jobs, initial_job_idx):
        for number, job in enumerate(jobs, initial_job_idx):
            if number == self.killed:
                raise KeyboardInterrupt
            self.begun.append(number)
            (self.folder / str(number)).mkdir()
            (self.folder / str(number) / "job.json").write_text(json.dumps({"status": "done", "overrides": job}))
            cfg = OmegaConf.create({"hydra": {"runtime": {"output_dir": str(self.folder / str(number))}}})
            yield SimpleNamespace(return_value=float(number), hydra_cfg=cfg)


SEARCH = ["stage=sft", "x=interval(0,1)", "y=choice(a,b)"]


@pytest.fixture
def search(tmp_path):
    """Run a study, or go on with it; returns the trials that were run."""

    def run(arguments=SEARCH, n_trials=3, direction="maximize", killed=None, storage=None):
        folder = tmp_path / "s"
        storage = storage or f"sqlite:///{folder}/study.db"
        sampler = optuna.samplers.RandomSampler
        sweeper = OptunaSweeper(direction, n_trials, 1, "study", storage, 1, sampler, None, None)
        sweeper.config = OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}, "callbacks": {}})
        sweeper.launcher, sweeper.validate_batch_is_legal = Launcher(folder, killed), lambda jobs: None
        with suppress(KeyboardInterrupt):
            sweeper.sweep(arguments)
        return sweeper.launcher.begun

    return run


def test_a_study_goes_on_with_what_it_was_begun_with(search, capsys):
    assert search(killed=1) == [0] and search() == [1, 2]
    for asked, said in (
        ({"direction": "minimize"}, "direction=minimize: the study that goes on has maximize"),
        (
            {"arguments": ["x=interval(0,1)", "y=choice(a,b,c)"]},
            r"y=choice\(a,b,c\): the study that goes on has choice\(a,b\)",
        ),
        ({"arguments": ["x=interval(1,0)"]}, r"x=interval\(1,0\): no value can be drawn"),
        ({"arguments": ["x=tag(log,interval(0,1))"]}, "no value can be drawn"),
        ({"n_trials": 0}, "at least one trial"),
    ):
        with pytest.raises(UserError, match=said):
            search(**{"n_trials": 4, **asked})
    assert search(["stage=ppo", *SEARCH[1:]], 4) == [3]  # those that were refused have left no trial
    assert "its trials so far had stage=sft; those to come are compared with them" in capsys.readouterr().out
    assert search(["stage=ppo", "x=interval(0,9)", "y=choice(a,b)"], 5) == [4]
    said = "study study: x is drawn from interval(0,1) so far, interval(0,9) from here on; the best is the best of both"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("was", "now", "shown"),
    [
        ("1e-9,1e-3", "1e-9,0.1", "x=choice(1e-09,0.1): the study that goes on has choice(1e-09,0.001)"),
        ("true,2,a", "false,2,a", "x=choice(False,2,a): the study that goes on has choice(True,2,a)"),
        ("null,'a b'", "null,c", "x=choice(null,c): the study that goes on has choice(null,'a b')"),
        ("range(1,9,2)", "interval(1,9)", "x=interval(1,9): the study that goes on has range(1,9,2)"),
        ("range(0.0,1.0,0.25)", "choice(1,2)", "x=choice(1,2): the study that goes on has range(0,1,0.25)"),
        ("int(interval(1,8))", "choice(1,2)", "x=choice(1,2): the study that goes on has range(1,9,1)"),
        ("tag(log,int(interval(1,8)))", "choice(1,2)", "has tag(log,interval(1,8))"),
        ("tag(log,interval(1,8))", "choice(1,2)", "x=choice(1,2): the study that goes on has tag(log,interval(1,8))"),
    ],
)
def test_values_of_each_form_go_on_and_others_are_refused(search, was, now, shown):
    assert search([f"x={was}"], 1) == [0] and search([f"x={was}"], 2) == [1]
    with pytest.raises(UserError, match=re.escape(shown)):
        search([f"x={now}"], 3)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:5000]), "storage=.*study.db: the study cannot be read"),
        (lambda file: file.write_bytes(b"[1]\n"), "storage=.*study.db: the study cannot be read"),
        (lambda file: (file.unlink(), file.mkdir()), "storage=.*study.db: the study cannot be read"),
        (lambda file: file.write_bytes(b""), "s/0 is a job of a sweep that study study .* knows nothing of"),
        (lambda file: file.unlink(), "s/0 is a job of a sweep that study study .* knows nothing of"),
    ],
)
def test_a_damaged_study_is_named(search, tmp_path, damage, said):
    search(n_trials=1)
    damage(tmp_path / "s" / "study.db")
    with pytest.raises(UserError, match=said):
        search()


def test_a_storage_that_is_none_is_named(search):
    for storage in ("nope", "sqlite:////nonexistent/study.db"):
        with pytest.raises(UserError, match=f"hydra.sweeper.storage={storage}: the study cannot be read"):
            search(storage=storage)


def test_one_command_runs_a_study_and_the_other_says_who(search, tmp_path):
    search(n_trials=1)
    said = rf"s is being written by process {os.getpid()} .*another hydra\.sweep\.dir="
    with held(tmp_path / "s/.study.lock", tmp_path / "s", ""), pytest.raises(UserError, match=said):
        search()
    assert search() == [1, 2]


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


def test_the_largest_loss_is_not_searched_for(lit_rlhf):
    search = ["-m", "stage=sft", "hydra/sweeper=optuna", "sft.optimizer.lr=interval(1e-4,1e-2)"]
    done = lit_rlhf(*search, check=False)
    assert done.returncode == 2 and "maximize: sft.val_loss is a loss" in done.stderr
    assert "set hydra.sweeper.direction=minimize" in done.stderr
