"""What a scheduler, a closed terminal and a person send, in a job of Slurm."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from lit_rlhf.errors import STOPPED
from lit_rlhf.pipeline.failures import STOPPED_BY_HAND
from lit_rlhf.training.trained_state import weights_fingerprint

SLURM = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_LOCALID": "0",
         "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS_PER_NODE": "1"}  # fmt: skip
MORE = ["stage=sft", "run=job", "from_run=quickstart", "sft.trainer.max_epochs=8"]


@pytest.fixture
def job(lit_rlhf, finished_run, tmp_path):
    """(signals, settings) -> exit code and what a job of Slurm says to them, and what ``scontrol`` was asked."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(finished_run / "runs" / "quickstart")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    env = {**lit_rlhf.env, **SLURM, "PATH": f"{tmp_path}/bin:{lit_rlhf.env['PATH']}"}

    def run(*signals, settings=(), hangup=signal.SIG_DFL):  # these tests may themselves be run by nohup
        process = subprocess.Popen(
            lit_rlhf.command(*MORE, *settings), cwd=tmp_path, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, hangup),
        )  # fmt: skip
        deadline = time.monotonic() + 300
        while signals and not (tmp_path / "runs/job/sft/checkpoints/last.ckpt").is_file():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        for number in signals:
            process.send_signal(number)
            time.sleep(0.05)
        said = "".join(process.communicate(timeout=300))
        asked = tmp_path / "asked"
        return process.returncode, said, asked.read_text() if asked.is_file() else ""

    return run


def weights_of(stage, name):
    """(step, digest) of a checkpoint."""
    checkpoint = torch.load(stage / "checkpoints" / name, weights_only=True)
    step = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
    once = {tensor.data_ptr(): tensor for tensor in checkpoint["state_dict"].values()}  # tied weights have two names
    return {"step": step, "digest": weights_fingerprint(iter(once.values()))}


def test_slurm_takes_the_machine_back_and_the_job_ends_as_if_it_had_not(job, lit_rlhf, tmp_path, same_weights):
    code, said, asked = job(signal.SIGUSR1, settings=["trainer.requeue=true"])
    assert (code, asked) == (STOPPED, "requeue 4711\n"), said
    assert "which is saved; run the same command again to go on" in said and "Traceback" not in said
    assert said.count("stopping: this step is ended and saved first") == 1
    sft = tmp_path / "runs" / "job" / "sft"
    assert not list(sft.rglob("hpc_ckpt*")) and not (sft / "model").exists()
    torch.save({"state_dict": {}}, sft / "hpc_ckpt_1.ckpt")  # of an older version; it was loaded before the export
    code, said, _ = job()
    assert code == 0 and "goes on from" in said
    lit_rlhf(*MORE, "run=whole")
    assert same_weights(sft, tmp_path / "runs" / "whole" / "sft")
    for run in ("job", "whole"):
        stage = tmp_path / "runs" / run / "sft"
        assert json.loads((stage / "done.json").read_text())["weights"] == weights_of(stage, "last.ckpt")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_is_no_warning_of_slurms_is_no_reason_to_requeue(job, number):
    # Schedulers and shells ask more than once: whenever that is, until the process has gone.
    code, said, asked = job(signal.SIGCONT, *[number] * 40, settings=["trainer.requeue=true"])
    assert (code, asked) == (STOPPED, "") and "un the same command again to go on" in said


def test_a_closed_terminal_is_ignored_under_nohup(job):
    code, said, _ = job(signal.SIGHUP, hangup=signal.SIG_IGN)
    assert code == 0 and "stopped" not in said


IN_A_FINALIZER = """
import os, signal, time, weakref
from functools import partial
from omegaconf import OmegaConf
from lit_rlhf.pipeline.command import stop_at_once

class Gone:
    pass

def finalizer(_):
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000):  # the handler runs in here, where nothing is raised
        pass

signal.signal(signal.SIGTERM, partial(stop_at_once, OmegaConf.create({"trainer": {}})))
gone = Gone()
reference = weakref.ref(gone, finalizer)
del gone
time.sleep(20)
"""


def test_a_signal_in_a_finalizer_is_not_lost(lit_rlhf):
    done = subprocess.run([sys.executable, "-c", IN_A_FINALIZER], env=lit_rlhf.env, capture_output=True, timeout=300)
    assert done.returncode == STOPPED, done.stderr


BETWEEN = """
import signal, sys
from lit_rlhf.errors import Interrupted
from lit_rlhf.pipeline import command
from lit_rlhf.training import resuming

handle_signals, came = resuming.handle_signals, []

def handled(handler):
    if handler is signal.SIG_IGN and not came:  # `run` is about to ignore more signals: one comes just before
        came.append(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    return handle_signals(handler)

def work(cfg):
    raise Interrupted("the first signal was handled", signal.SIGTERM)

resuming.handle_signals, command.work = handled, work
sys.argv = ["lit-rlhf", "stage=pretrain"]
command.main()
"""


def test_a_second_signal_while_the_first_is_answered_still_says_how_to_go_on(lit_rlhf, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BETWEEN], env=lit_rlhf.env, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == STOPPED and "un the same command again to go on" in done.stderr, done.stderr


POOL = """
import signal, sys
import hydra
from lit_rlhf.pipeline import command, failures

def launched(**_):
    def run():
        failures.sweep_begins("sweeps/one")
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:  # a pool whose idle process was interrupted, too, says this in its place
            raise RuntimeError("A task has failed to un-serialize.")
    return lambda job: run

hydra.main = launched
sys.argv = ["lit-rlhf", "-m", "stage=pretrain", "seed=1,2"]
command.main()
"""


def test_a_sweep_that_is_stopped_says_so_whatever_its_launcher_raises(lit_rlhf, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", POOL], env=lit_rlhf.env, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == STOPPED_BY_HAND and "sweep ended; to go on, add hydra.sweep.dir=sweeps/one" in done.stderr


EARLY = """
import signal, sys
from lit_rlhf.pipeline import command

def compose(arguments):
    signal.raise_signal(signal.SIGUSR1)

command.one_job = compose
sys.argv = ["lit-rlhf", "stage=pretrain"]
command.main()
"""


def test_a_signal_before_anything_has_begun_is_one_line(lit_rlhf, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", EARLY], env=lit_rlhf.env, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == STOPPED and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
