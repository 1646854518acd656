"""Commands as processes of their own that have imported everything already: imports are most of a short command.

One JSON line a command comes in, {"arguments", "cwd", "env", "stdout", "stderr"} with files for the last two; its exit
status goes out as a line when it has ended. Of several processes that run it together ``starts`` has what each has for
itself, and the line their statuses."""

import json
import os
import runpy
import sys

import full_disk
from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

import lit_rlhf.pipeline.rounds  # noqa: F401
from lit_rlhf.pipeline import failures
from lit_rlhf.stages import *  # noqa: F403  every stage, which is else imported when it is run


def become(asked: dict) -> None:
    """Make of a fresh fork what a shell makes of a command."""
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    for number, file in ((1, asked["stdout"]), (2, asked["stderr"])):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0)  # noqa: SIM115  this process's own has been read from
    failures.PARENT = os.getppid()
    sys.argv = ["lit_rlhf", *asked["arguments"]]
    if asked.get("disk"):
        full_disk.install(asked["disk"])


def asked_of_fork() -> dict | None:
    """What the fork that returns is to become; None: there are no more commands."""
    for line in sys.stdin:
        asked, begun = json.loads(line), []
        for own in asked.get("starts", [{}]):
            begun.append(os.fork())
            if not begun[-1]:
                return asked | own
        print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in begun), flush=True)
    return None


if asked := asked_of_fork():
    become(asked)
    runpy.run_module("lit_rlhf", run_name="__main__", alter_sys=True)  # ends with what is to be done at its exit
