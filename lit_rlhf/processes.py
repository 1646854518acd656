"""Rank of this process among those of one command, whatever has started them."""

from __future__ import annotations

import os
from typing import NamedTuple

NO_TASK = 2**32 - 16  # numbers of Slurm's steps from here on are the batch script, the shell of salloc and the like


class NoNumber(ValueError):
    """A launcher's variable in the environment is no number."""


class Process(NamedTuple):
    """A process among those of one command."""

    rank: int  # 0: the one that writes
    local_rank: int  # on its node
    node: int
    world_size: int  # how many there are, on all nodes


def this_process() -> Process:
    """This process, as its launcher says: torchrun, Slurm's srun, the command itself, or Lightning.

    Lightning tells the processes that it starts their rank on the node alone."""
    if by_srun():
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS")
        return Process(*(number_of(name) for name in names))
    local_rank, node = number_of("LOCAL_RANK"), number_of("GROUP_RANK", number_of("NODE_RANK"))
    return Process(number_of("RANK", local_rank or node), local_rank, node, number_of("WORLD_SIZE", 1))


def by_srun() -> bool:
    """Whether Slurm's srun has started this process as one of its tasks.

    Of a step with a number that is sure; without one, a job's name tells as it does for Lightning: salloc's shell."""
    env = os.environ
    if "SLURM_NTASKS" not in env or "RANK" in env:  # torchrun may run inside a job of Slurm's
        return False
    step = env.get("SLURM_STEP_ID", "")
    if step.isdecimal():
        return int(step) < NO_TASK and number_of("SLURM_STEP_NUM_TASKS", 2) > 1  # srun --pty bash: one
    return env.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def number_of(name: str, default: int = 0) -> int:
    """A whole number from the environment. Raises ``NoNumber`` where something else stands there."""
    told = os.environ.get(name)
    if told is not None and not told.isdecimal():
        raise NoNumber(f"{name}={told} in the environment: a whole number from 0 on was expected")
    return default if told is None else int(told)


def is_main_process() -> bool:
    """Whether this process writes: files, the terminal, what a logger gets."""
    return this_process().rank == 0


def name_submitit_task() -> None:
    """Tell a task of submitit's local executor what torchrun would have; in its jobs of Slurm's, srun has told it."""
    env = os.environ
    if env.get("SUBMITIT_EXECUTOR") == "local" and int(env["SUBMITIT_LOCAL_NTASKS"]) > 1:
        rank, tasks = env["SUBMITIT_LOCAL_GLOBALID"], env["SUBMITIT_LOCAL_NTASKS"]
        port = 20_000 + int(env["SUBMITIT_LOCAL_JOB_ID"]) % 40_000  # of the processes of this machine, one's number
        env |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": tasks, "LOCAL_WORLD_SIZE": tasks}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
