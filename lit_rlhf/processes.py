"""Rank of this process among those of one command, whatever has started them."""

from __future__ import annotations

import os
from typing import NamedTuple


class Process(NamedTuple):
    """A process among those of one command."""

    rank: int  # 0: the one that writes
    local_rank: int  # on its node
    node: int
    world_size: int  # how many there are, on all nodes


def this_process() -> Process:
    """This process, as its launcher says: torchrun, Slurm's srun, the command itself, or Lightning.

    Lightning tells the processes that it starts their rank on the node alone."""
    env = os.environ
    # As lightning.fabric.plugins.environments.SLURMEnvironment sees it; torchrun may run inside a job of Slurm's.
    by_srun = "SLURM_NTASKS" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive")
    if by_srun and "RANK" not in env:
        names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS")
        rank, local_rank, node, world_size = (int(env.get(name, 0)) for name in names)
        return Process(rank, local_rank, node, world_size)
    local_rank, node = int(env.get("LOCAL_RANK", 0)), int(env.get("GROUP_RANK", env.get("NODE_RANK", 0)))
    return Process(int(env.get("RANK", local_rank or node)), local_rank, node, int(env.get("WORLD_SIZE", 1)))


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
