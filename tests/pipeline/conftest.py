import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

REPO = Path(__file__).parents[2]
FAST = ["debug=fast", "logger=csv", "callbacks.progress_bar=false", "threads=1"]


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """Run a command in forks of a process that has imported everything: warm(arguments, folder, env) in one,
    warm.several(arguments, folder, environments) in as many, which run it together."""
    folder = tmp_path_factory.mktemp("said")
    command = [sys.executable, str(Path(__file__).with_name("warm.py"))]
    env = {**environment(), "TORCH_CPP_LOG_LEVEL": "ERROR"}  # as the command sets it before torch is imported
    server = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def several(arguments, cwd, envs):
        files = [[folder / f"{name}-{i}" for name in ("stdout", "stderr")] for i in range(len(envs))]
        starts = [{"env": env, "stdout": str(out), "stderr": str(err)} for env, (out, err) in zip(envs, files)]
        server.stdin.write(json.dumps({"arguments": arguments, "cwd": str(cwd), "starts": starts}) + "\n")
        server.stdin.flush()
        codes = map(int, server.stdout.readline().split())
        said = [[file.read_text(encoding="utf-8") for file in own] for own in files]
        return [subprocess.CompletedProcess(arguments, code, *own) for code, own in zip(codes, said)]

    def run(arguments, cwd, env):
        return several(arguments, cwd, [env])[0]

    run.several, run.pid = several, server.pid
    yield run
    server.stdin.close()
    server.wait(timeout=60)


def environment():
    under_load = {"LIT_RLHF_START_TIMEOUT": "300"}
    return {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", **under_load}


@pytest.fixture
def lit_rlhf(tmp_path, request):
    """Run the command in an empty folder: lit_rlhf("stage=sft", ...) -> completed process with text output.

    ``fresh=True`` starts it as a shell does; else it is forked where everything is imported already."""

    def run(*arguments, fast=True, check=True, cwd=None, fresh=False, env=None, **settings):
        arguments = [*arguments, *(FAST if fast else ())]
        if fresh or env or settings:
            env = {**environment(), **(env or {})}
            done = subprocess.run(
                [sys.executable, "-m", "lit_rlhf", *arguments], cwd=cwd or tmp_path, env=env,
                capture_output=True, text=True, timeout=500, **settings,
            )  # fmt: skip
        else:
            done = request.getfixturevalue("warm")(arguments, cwd or tmp_path, environment())
        assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    run.command = lambda *arguments: [sys.executable, "-m", "lit_rlhf", *arguments, *FAST]
    run.env = environment()
    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, worker_id):
    """A whole pipeline in miniature: runs/quickstart below the folder that is returned. Do not write into it."""
    shared = tmp_path_factory.getbasetemp()
    folder = (shared if worker_id == "master" else shared.parent) / "pipeline"
    with FileLock(f"{folder}.lock"):  # of two workers one makes it, for both
        if not (folder / "runs/quickstart/report.html").is_file():
            folder.mkdir(exist_ok=True)
            command = [sys.executable, "-m", "lit_rlhf", *FAST]
            done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=500)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def weights(folder):
    """The tensors of a model folder."""
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture
def same_weights():
    def same(a, b):
        first, second = weights(a), weights(b)
        return first.keys() == second.keys() and all((first[k] == second[k]).all() for k in first)

    return same
