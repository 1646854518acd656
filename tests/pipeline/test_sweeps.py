"""Sweeps whose jobs other launchers start: jobs that fail, are stopped, run in two processes, are killed."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from omegaconf import OmegaConf

from lit_rlhf.errors import NoFigure, UserError
from lit_rlhf.pipeline.command import check_jobs
from lit_rlhf.pipeline.run_folder import register_resolvers
from lit_rlhf.pipeline.sweep import objective_of
from lit_rlhf.processes import name_submitit_task, this_process

register_resolvers()

GOOD_AND_BAD = "sft.optimizer.lr=1e-3,1e30"  # the second diverges
TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["trainer.devices=null"], "trainer.devices=null: it should be"),
        (["trainer=ddp"], "sft.trainer asks for 2 processes, and under multirun (-m) this launcher starts 1 per job"),
        (["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2"], "asks for 1 processes, and .* starts 2"),
        (["stage=label"], "stage=label cannot run under multirun"),
    ],
)
def test_jobs_that_cannot_run_are_refused_before_the_first(settings, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said.replace("(-m)", r"\(-m\)")):
        check_jobs(["stage=sft", "seed=1,2", *settings], None)


def test_jobs_in_as_many_processes_as_a_launcher_starts_are_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-rlhf"])
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.tasks_per_node=4", "hydra.launcher.nodes=2"]
    check_jobs(["stage=sft", "seed=1,2", "trainer=ddp", "trainer.devices=4", "trainer.num_nodes=2", *launcher], None)


@pytest.mark.parametrize(
    ("objective", "kind"),
    [
        ("ppo.kll", NoFigure),
        ("ppo.rate", NoFigure),
        ("ppo.kl.mean", NoFigure),
        ("nope", NoFigure),
        ("ppo.gold", UserError),
    ],
)
def test_an_objective_that_is_no_number_ends_the_sweep_unless_another_job_may_have_it(objective, kind):
    summary = {"ppo": {"kl": 0.5, "gold": None, "rate": {"mean": 0.75}}}
    cfg = OmegaConf.create({"objective": objective})
    with pytest.raises(UserError, match=rf"objective={objective}: .* it has ppo\.kl, ppo\.rate\.mean") as found:
        objective_of(cfg, summary, ["ppo"])
    assert type(found.value) is kind
    assert objective_of(OmegaConf.create({"objective": "ppo.rate.mean"}), summary, ["ppo"]) == ("ppo.rate.mean", 0.75)


def test_a_task_of_submitits_local_executor_knows_its_rank(monkeypatch):
    before = dict(os.environ)
    told = {"NTASKS": 2, "GLOBALID": 1, "JOB_ID": 70_001}
    for name, value in told.items():
        monkeypatch.setenv(f"SUBMITIT_LOCAL_{name}", str(value))
    try:
        name_submitit_task()
        assert this_process().world_size == 1  # of another executor's job
        monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
        name_submitit_task()
        assert this_process() == (1, 1, 0, 2) and os.environ["MASTER_PORT"] == "50001"
    finally:
        for name in {*os.environ} - {*before}:
            del os.environ[name]


@pytest.fixture
def sweep(lit_rlhf, finished_run, tmp_path):
    """sweep(name, settings) -> a process of a sweep of SFT, with a process group; it writes sweeps/name."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(finished_run / "runs" / "quickstart")
    begun = []

    def start(name, *settings):
        command = lit_rlhf.command(
            "-m", "stage=sft", "from_run=quickstart", "run=swept", f"hydra.sweep.dir=sweeps/{name}", *settings
        )
        begun.append(
            subprocess.Popen(command, cwd=tmp_path, env=lit_rlhf.env, text=True, start_new_session=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )  # fmt: skip
        return begun[-1]

    yield start
    for process in begun:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def ended(process):
    out, err = process.communicate(timeout=400)
    assert "Traceback" not in out + err, out + err
    return process.returncode, out, err


def statuses(folder):
    return [row["status"] for row in csv.DictReader((folder / "sweep.csv").open())]


def wait_for(file, process):
    deadline = time.monotonic() + 300
    while not file.is_file():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_sweep_by_joblib_is_stopped_goes_on_and_names_the_job_that_fails(sweep, tmp_path):
    settings = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", GOOD_AND_BAD, "sft.trainer.max_epochs=6"]
    first = sweep("one", *settings)
    wait_for(tmp_path / "sweeps/one/0/sft/checkpoints/last.ckpt", first)
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does
    code, _, said = ended(first)
    assert code == 130, said
    assert "to go on, add hydra.sweep.dir=sweeps/one to the same command" in said
    code, out, said = ended(sweep("one", *settings))
    assert "goes on from" in out and statuses(tmp_path / "sweeps/one") == ["done", "failed"]
    assert code == 1 and "job 1 (" in out and "failed: sft: at step" in out


@pytest.mark.slow
def test_jobs_in_two_processes_by_submitit_equal_two_processes_of_the_command(sweep, lit_rlhf, tmp_path, same_weights):
    launcher = ["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2"]
    code, out, _ = ended(sweep("one", *launcher, *TWO, GOOD_AND_BAD))
    folder = tmp_path / "sweeps/one"
    assert code == 1 and statuses(folder) == ["done", "failed"] and "failed: sft: at step" in out
    lit_rlhf("stage=sft", "from_run=quickstart", "run=two", "sft.optimizer.lr=1e-3", *TWO, fresh=True)
    assert same_weights(folder / "0" / "sft", tmp_path / "runs/two/sft")
    figures = [json.loads(file.read_text()) for file in (folder / "0/summary.json", tmp_path / "runs/two/summary.json")]
    assert figures[0]["sft"] == figures[1]["sft"]
