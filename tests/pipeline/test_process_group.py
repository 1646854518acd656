"""Processes of one command: how they find each other, and what is said when one of them cannot go on."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta

import pytest
import torch.distributed as dist
from filelock import FileLock
from omegaconf import OmegaConf

from lit_rlhf.errors import UserError
from lit_rlhf.pipeline import process_group

TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
BROKEN = """
import os
from lit_rlhf.stages import SFTModule

class Broken(SFTModule):
    def on_train_batch_start(self, batch, batch_idx):
        if self.global_rank == 1 and self.global_step == 2 and os.environ.get("BREAK"):
            raise ZeroDivisionError("by process 1 alone")
"""


@pytest.fixture
def rank(monkeypatch):
    """rank(number, port): this process is one of two."""

    def tell(number, port):
        told = {"RANK": number, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in told.items():
            monkeypatch.setenv(name, str(value))

    monkeypatch.setenv("LIT_RLHF_START_TIMEOUT", "1")
    return tell


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("number", [0, 1])
def test_a_node_that_does_not_come_is_one_line_after_a_stated_time(rank, number, capfd):
    rank(number, process_group._free_port())
    began = time.monotonic()
    with pytest.raises(UserError, match=r"waited 1 s for the other processes in vain.* See whether all 2 are"):
        process_group._joined(2, 2)
    said = capfd.readouterr()
    assert time.monotonic() - began < 10 and not said.err
    assert ("waiting for 1 process of 2 nodes, 1 s at most" in said.out) == (number == 0)
    assert process_group._to_start(1).seconds == 1


def test_an_address_that_is_none_is_said(rank):
    rank(1, "some")
    with pytest.raises(UserError, match=r"MASTER_ADDR=127.0.0.1 and MASTER_PORT=some: name and port of the first"):
        process_group._joined(2, 2)


def test_how_long_processes_wait_for_each_other(monkeypatch):
    monkeypatch.delenv("LIT_RLHF_START_TIMEOUT", raising=False)
    assert [process_group._to_start(nodes).seconds for nodes in (1, 2)] == [600, 45]
    monkeypatch.setenv("LIT_RLHF_START_TIMEOUT", "ten")
    with pytest.raises(UserError, match="LIT_RLHF_START_TIMEOUT=ten: a whole number of seconds was expected"):
        process_group._to_start(2)


def test_a_port_in_use_is_named(rank, listening):
    rank(0, listening)
    with pytest.raises(UserError, match=f"MASTER_PORT={listening}: this port is in use; set another for all"):
        process_group._joined(2, 2)


def joining(port, rank, size):
    """A process that wants to join ``size`` of them."""
    env = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "LIT_RLHF_START_TIMEOUT": "3",
    }
    command = [
        sys.executable,
        "-c",
        f"from lit_rlhf.pipeline import process_group; process_group._joined({size}, {size})",
    ]
    return subprocess.Popen(command, env={**env, "MASTER_PORT": str(port)}, text=True, stderr=subprocess.PIPE)


def test_a_program_that_listens_in_place_of_the_first_process_is_not_waited_for(listening):
    other = joining(listening, 1, 2)
    _, said = other.communicate(timeout=100)
    assert other.returncode == 2 and said.count("\n") == 1, said
    assert "waited 3 s for the other processes in vain" in said and f"127.0.0.1:{listening}" in said


def test_nodes_that_were_told_of_other_numbers_do_not_wait_for_ever():
    port = process_group._free_port()
    begun = [joining(port, rank, size) for rank, size in ((0, 2), (1, 3))]
    said = [process.communicate(timeout=100)[1] for process in begun]
    assert all(process.returncode for process in begun)
    assert "process 1 is one of 3, and process 0 one of 2; trainer.devices and trainer.num_nodes must be" in said[0]
    assert "process 0 is one of 2, and process 1 one of 3" in said[1] or "waited 3 s for the other" in said[1]


def test_a_node_that_there_is_not_is_named(monkeypatch):
    monkeypatch.setenv("NODE_RANK", "2")
    for nodes in (1, 2):
        with pytest.raises(
            UserError, match=rf"NODE_RANK=2: of trainer.num_nodes={nodes}, 0 to {nodes - 1} were expected"
        ):
            process_group.start_others(1, nodes)
    monkeypatch.delenv("NODE_RANK")
    assert process_group.start_others(1, 1) == []


def test_steps_of_one_job_do_not_meet(monkeypatch):
    for name, value in {"NTASKS": 2, "NTASKS_PER_NODE": 2, "JOB_ID": 4711, "NODELIST": "a"}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # what is set in the end is taken back with it
        monkeypatch.delenv(name)
    found = set()
    for step in range(20):
        monkeypatch.setenv("SLURM_STEP_ID", str(step))
        found.add(process_group._address())
        monkeypatch.delenv("MASTER_PORT")
    assert len(found) == 20 and all(1024 < port < 2**16 for _, port in found)


def test_settings_that_differ_between_processes_are_refused_by_all(rank, monkeypatch, tmp_path):
    monkeypatch.setenv("LIT_RLHF_START_TIMEOUT", "60")
    port = process_group._free_port()

    def start(number, batch_size):
        rank(number, port)
        sft = {"trainer": {"devices": 2}, "data": {"batch_size": batch_size}}
        cfg = OmegaConf.create({"sft": sft, "paths": {"run_dir": str(tmp_path), "cache": f"/of/node{number}"}})
        said = r"sft\.data\.batch_size=4 in process 1, and sft\.data\.batch_size=16 in the first; start all processes"
        with pytest.raises(UserError, match=said), process_group.together(cfg, ["sft"]):
            raise AssertionError("they go on")

    if not (second := os.fork()):
        try:
            start(1, 4)
            os._exit(0)
        finally:
            os._exit(1)
    start(0, 16)
    assert os.waitpid(second, 0)[1] == 0


def test_who_waits_for_one_that_ends_with_an_error_hears_of_it(rank, monkeypatch, tmp_path):
    monkeypatch.setenv("LIT_RLHF_START_TIMEOUT", "60")
    cfg = OmegaConf.create({"sft": {"trainer": {"devices": 2}}, "paths": {"run_dir": str(tmp_path)}})
    port = process_group._free_port()
    if not (second := os.fork()):
        try:
            rank(1, port)
            with (
                pytest.raises(UserError, match="was killed or lost"),
                process_group.together(cfg, ["sft"]) as both,
            ):
                both.agreed(lambda: 1)
            os._exit(0)
        finally:
            os._exit(1)
    ended = []

    def wait_for_the_end(others):
        until = time.monotonic() + 20
        while (found := os.waitpid(second, os.WNOHANG)) == (0, 0) and time.monotonic() < until:
            time.sleep(0.05)
        ended.append(found)

    monkeypatch.setattr(process_group, "_end", wait_for_the_end)
    rank(0, port)
    with pytest.raises(UserError, match="being written"), process_group.together(cfg, ["sft"]):
        raise UserError("being written by another")
    if ended == [(0, 0)]:
        os.kill(second, signal.SIGKILL)
    assert ended == [(second, 0)]


KILLED = r"process 1 was ended by signal 9 (the kernel does that where memory runs out). Run the same command again"


@pytest.fixture
def with_other(tmp_path, monkeypatch):
    """with_other() -> (with together(), as the first process of two; the other one, which it has started)."""

    def begin():
        other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        monkeypatch.setattr(process_group, "start_others", lambda *_: [other])
        return process_group.together(OmegaConf.create({"paths": {"run_dir": str(tmp_path)}}), []), other

    monkeypatch.setattr(process_group, "SECONDS_TO_HEAR", 0.2)
    monkeypatch.setattr(process_group, "SECONDS_TO_END", 1.0)
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))  # as outside of training
    yield begin
    signal.signal(signal.SIGTERM, handler)


def test_a_process_that_is_killed_while_the_first_one_samples_by_itself_ends_that(with_other):
    """The first one talks to nobody then, so nothing tells it."""
    together, other = with_other()
    with pytest.raises(UserError, match=re.escape(KILLED)), together:
        other.kill()
        time.sleep(30)
        raise AssertionError("it goes on")


def test_a_process_that_is_killed_ends_one_that_no_signal_gets_through_to(with_other, tmp_path):
    """Inside of torch, which waits for another process: to make a group with it, say."""
    if not (first := os.fork()):
        try:
            together, other = with_other()
            sys.stderr = (tmp_path / "said").open("w")
            with together:
                other.kill()
                dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=30)).wait(["never there"])
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) == 2
    assert KILLED in (tmp_path / "said").read_text()


@pytest.fixture
def start(lit_rlhf, finished_run, tmp_path):
    """start(settings) -> the first of two processes that train SFT in the run ``two``."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(finished_run / "runs" / "quickstart")
    (tmp_path / "broken.py").write_text(BROKEN)
    begun = []

    def run(**env):
        command = lit_rlhf.command(
            "stage=sft", "from_run=quickstart", "run=two", *TWO, "sft.module._target_=broken.Broken",
            "sft.trainer.max_epochs=40", "sft.checkpoint_every=1",
        )  # fmt: skip
        begun.append(
            subprocess.Popen(command, cwd=tmp_path, env={**lit_rlhf.env, **env}, text=True, start_new_session=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )  # fmt: skip
        return begun[-1]

    yield run
    for process in begun:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_what_ends_one_process_ends_both_with_one_line_and_the_next_start_goes_on(start, tmp_path):
    first = start(BREAK="1")
    _, said = first.communicate(timeout=400)
    assert first.returncode == 2 and said.count("\n") == 1, said
    assert (
        "lit-rlhf: process 1: unexpected ZeroDivisionError: by process 1 alone (where it happened: runs/two/error"
        in said
    )
    assert "by process 1 alone" in (tmp_path / "runs/two/error.log").read_text()
    second = start()
    for line in second.stdout:
        if "goes on from" in line:
            break
    else:
        raise AssertionError(second.stderr.read())
    checkpoint = tmp_path / "runs/two/sft/checkpoints/last.ckpt"
    written, deadline = checkpoint.stat().st_mtime_ns, time.monotonic() + 200
    while checkpoint.stat().st_mtime_ns == written and time.monotonic() < deadline:
        time.sleep(0.05)
    second.kill()  # the first process, as the kernel does for want of memory
    begun = time.monotonic()
    said = second.stderr.read()  # until the other process has ended, too
    assert time.monotonic() - begun < 60 and said.count("\n") == 1
    assert "lit-rlhf: another process was killed or lost (the kernel does that where memory runs out). Run" in said


@pytest.mark.slow
def test_two_starts_of_one_run_in_two_processes_are_one_line(start, tmp_path):
    (tmp_path / "runs" / "two").mkdir()
    lock = tmp_path / "runs" / "two" / ".sft.lock"
    with FileLock(lock):
        lock.write_text("process 1 on node7")
        second = start()
        _, said = second.communicate(timeout=400)
    assert second.returncode == 2 and said.count("\n") == 1, said
    assert "sft is being written by process 1 on node7; wait for that to end" in said
