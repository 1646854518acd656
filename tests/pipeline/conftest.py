import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

REPO = Path(__file__).parents[2]
FAST = ["debug=fast", "logger=csv", "callbacks.progress_bar=false", "threads=1"]


@pytest.fixture
def lit_rlhf(tmp_path):
    """Run the command in an empty folder: lit_rlhf("stage=sft", ...) -> completed process with text output."""

    def run(*arguments, fast=True, check=True, cwd=None, **settings):
        command = [sys.executable, "-m", "lit_rlhf", *arguments, *(FAST if fast else ())]
        env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=cwd or tmp_path, env=env, capture_output=True, text=True, timeout=500, **settings
        )
        assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    run.command = lambda *arguments: [sys.executable, "-m", "lit_rlhf", *arguments, *FAST]
    run.env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, worker_id):
    """A whole pipeline in miniature: runs/quickstart below the folder that is returned. Do not write into it."""
    shared = tmp_path_factory.getbasetemp()
    folder = (shared if worker_id == "master" else shared.parent) / "pipeline"
    with FileLock(f"{folder}.lock"):  # of two workers one makes it, for both
        if not (folder / "runs/quickstart/report.html").is_file():
            folder.mkdir(exist_ok=True)
            env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "lit_rlhf", *FAST]
            done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=500)
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
