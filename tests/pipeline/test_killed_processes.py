"""One of two processes is killed in the middle of a stage: the other one ends, too, and the next start goes on.

SFT, whose processes the command starts itself, is in test_launchers.py."""

import os
import signal
import subprocess
import threading
import time

import pytest
from launchers import on_one_node

pytestmark = pytest.mark.slow
STAGES = {
    "preference": (["trainer=ddp", "preference.data.batch_size=2"], "progress.jsonl"),
    "ppo": (["trainer=fsdp", "trainer.strategy.save_async=true", "ppo.data.batch_size=4"], "checkpoints/last.ckpt"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_process_ends_both_with_one_line_and_the_next_start_goes_on(
    stage, warm, lit_rlhf, finished_run, tmp_path
):
    settings, begun = STAGES[stage]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(finished_run / "runs" / "quickstart")
    asked = [f"stage={stage}", "from_run=quickstart", "run=killed", "trainer.accelerator=cpu", *settings]
    _, _, _, *command = lit_rlhf.command(*asked)
    done = []

    def start():
        done[:] = warm.several(command, tmp_path, [{**lit_rlhf.env, **env} for _, env in on_one_node()])

    running = threading.Thread(target=start)
    running.start()
    deadline = time.monotonic() + 200
    while not (tmp_path / "runs/killed" / stage / begun).exists():
        assert running.is_alive() and time.monotonic() < deadline, done
        time.sleep(0.01)
    _, second = subprocess.check_output(["pgrep", "-P", str(warm.pid)], text=True).split()
    os.kill(int(second), signal.SIGKILL)
    running.join(60)
    assert not running.is_alive()
    first, killed = done
    assert killed.returncode == -signal.SIGKILL and first.returncode == 2
    [line] = [line for line in first.stderr.splitlines() if line.startswith("lit-rlhf:")]
    assert line.startswith("lit-rlhf: another process was killed or lost") and "Run the same command again" in line
    start()
    assert [each.returncode for each in done] == [0, 0], done
    assert stage == "preference" or "ppo: goes on from" in done[0].stdout  # a journal is gone on with in silence
