"""Which process this is, as each launcher says it."""

import os

import pytest

from lit_rlhf.processes import NoNumber, Process, is_main_process, this_process

SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Process(0, 0, 0, 1)),
        ({"RANK": "3", "LOCAL_RANK": "1", "GROUP_RANK": "1", "WORLD_SIZE": "4"}, Process(3, 1, 1, 4)),  # torchrun
        ({"RANK": "2", "LOCAL_RANK": "0", "GROUP_RANK": "1", "WORLD_SIZE": "4"}, Process(2, 0, 1, 4)),
        (SLURM, Process(3, 1, 1, 4)),
        ({**SLURM, "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}, Process(2, 0, 1, 4)),
        ({**SLURM, "SLURM_JOB_NAME": "interactive"}, Process(0, 0, 0, 1)),  # salloc: the job's shell, not a task
        (
            {**SLURM, "SLURM_JOB_NAME": "interactive", "SLURM_STEP_ID": "0"},
            Process(3, 1, 1, 4),
        ),  # srun inside of salloc
        ({**SLURM, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, Process(0, 0, 0, 1)),  # srun --pty bash
        ({**SLURM, "SLURM_STEP_ID": "4294967291"}, Process(0, 0, 0, 1)),  # the batch script itself
        ({**SLURM, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, Process(0, 0, 0, 2)),  # torchrun in a Slurm job
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, Process(1, 1, 0, 2)),  # started by Lightning
        ({"NODE_RANK": "1"}, Process(1, 0, 1, 1)),  # by hand, on the second of two nodes
    ],
)
def test_each_launcher_is_understood(variables, expected, monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_") or name.endswith("RANK")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert this_process() == expected
    assert is_main_process() == (expected.rank == 0)


@pytest.mark.parametrize("told", ["x", "-1", "1.5", ""])
def test_a_rank_that_is_no_number_is_named(told, monkeypatch):
    monkeypatch.setenv("NODE_RANK", told)
    with pytest.raises(NoNumber, match=f"NODE_RANK={told} in the environment: a whole number from 0 on was expected"):
        this_process()
