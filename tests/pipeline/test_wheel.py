"""The wheel holds all that the command needs."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


@pytest.mark.slow
def test_wheel_in_a_venv_of_its_own_runs_a_stage_from_another_folder(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(REPO)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    wheel = next(tmp_path.glob("lit_rlhf-*.whl"))
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    # The dependencies are borrowed from this environment; lit_rlhf itself is found in the venv first.
    ask = [python, "-c", "import site; print(site.getsitepackages()[0])"]
    site = Path(subprocess.check_output(ask, text=True).strip())
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    code = "import lit_rlhf, lit_rlhf.pipeline.settings as s; print(lit_rlhf.__file__, s.conf_dir())"
    assert list(site.glob("hydra_plugins/lit_rlhf_optuna.py"))  # Hydra looks for sweepers there
    places = subprocess.check_output([python, "-c", code], text=True, cwd=elsewhere, env=env).split()
    assert all(place.startswith(str(tmp_path / "venv")) for place in places)
    command = [
        tmp_path / "venv" / "bin" / "lit-rlhf", "stage=pretrain", "debug=fast", "logger=csv",
        "callbacks.progress_bar=false", "threads=1",
    ]  # fmt: skip
    subprocess.run(command, check=True, cwd=elsewhere, env=env, capture_output=True, timeout=300)
    assert (elsewhere / "runs" / "quickstart" / "report.html").is_file()
