"""One of two processes is killed in the middle of each stage: the other one ends, too, and the next start goes on.

What a process says that has started the others is in test_process_group.py."""

import os
import signal
import subprocess
import threading
import time

import pytest
from launchers import on_one_node

pytestmark = pytest.mark.slow
BEGUN = {  # in the order in which they run: what is there when a stage is in its middle
    "pretrain": "checkpoints/last.ckpt", "classify": "checkpoints/last.ckpt", "sft": "checkpoints/last.ckpt",
    "preference": "progress.jsonl", "reward": "checkpoints/last.ckpt", "ppo": "checkpoints/last.ckpt",
    "dpo": "checkpoints/last.ckpt", "evaluate": "config.yaml",
}  # fmt: skip
SMALL = [
    "trainer=fsdp", "trainer.strategy.save_async=true", "trainer.accelerator=cpu", "trainer.devices=2", "model=pico",
    "preference.data.batch_size=2", "ppo.data.batch_size=4", "evaluate.data.batch_size=2",
    *(f"{stage}.sampling.max_new_tokens=6" for stage in ("preference", "ppo", "dpo.module", "evaluate")),
]  # fmt: skip


@pytest.fixture
def start(warm, lit_rlhf, tmp_path):
    """start() -> (thread that ends with both processes of the chain, what they have ended with)."""
    _, _, _, *command = lit_rlhf.command(f"stage=[{','.join(BEGUN)}]", "run=killed", *SMALL)

    def begin():
        done = []
        envs = [{**lit_rlhf.env, **env} for _, env in on_one_node()]
        running = threading.Thread(target=lambda: done.extend(warm.several(command, tmp_path, envs)))
        running.start()
        return running, done

    return begin


@pytest.mark.timeout(1200)
def test_a_killed_process_ends_both_with_one_line_and_the_next_start_goes_on(start, warm, tmp_path):
    goes_on = ""
    for number, (stage, file) in enumerate(BEGUN.items()):
        running, done = start()
        deadline = time.monotonic() + 200
        while not (tmp_path / "runs/killed" / stage / file).exists():
            assert running.is_alive() and time.monotonic() < deadline, (stage, done)
            time.sleep(0.01)
        victim = number % 2  # the first of them is not the one that has started the other
        os.kill(int(subprocess.check_output(["pgrep", "-P", str(warm.pid)], text=True).split()[victim]), signal.SIGKILL)
        running.join(60)
        assert not running.is_alive(), stage
        left, killed = done[1 - victim], done[victim]
        assert killed.returncode == -signal.SIGKILL and left.returncode == 2, stage
        [line] = [line for line in left.stderr.splitlines() if line.startswith("lit-rlhf:")]
        assert line.startswith("lit-rlhf: another process was killed or lost") and "Run the same command again" in line
        assert left.stderr.count("\n") == 1 and goes_on in done[0].stdout, done
        goes_on = f"\n{stage}: goes on from" if file.endswith(".ckpt") else ""  # a journal in silence
    running, done = start()
    running.join(200)
    assert [each.returncode for each in done] == [0, 0], done
