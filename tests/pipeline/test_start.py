"""The start: what is imported when, and how often the settings are composed."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hydra.types import RunMode
from omegaconf import OmegaConf

# Each takes its time to import, and a stage that does not use it shall not wait for it. (Lightning's torchmetrics
# imports matplotlib and a part of scipy where they are installed.)
UNUSED = ("datasets", "pandas", "peft", "pyarrow", "sklearn", "tensorboard", "wandb")
PROBE = """
import sys
from lit_rlhf.stages import PretrainModule

class Probe(PretrainModule):
    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 0:
            print("imported:", *sorted(name for name in sys.modules if "." not in name))
"""


def imported(said):
    return set(next(line for line in said.splitlines() if line.startswith("imported:")).split()[1:])


def python(code, lit_rlhf):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=lit_rlhf.env, capture_output=True, text=True, timeout=100, check=True).stdout


def test_the_command_answers_before_torch_is_imported(lit_rlhf):
    code = "import sys, lit_rlhf.pipeline; print('imported:', *sys.modules)"
    assert not imported(python(code, lit_rlhf)) & {"torch", "transformers", "lightning", "numpy", *UNUSED}


@pytest.mark.parametrize(
    ("threads", "processes", "variable", "taken"),
    [(None, 1, "", 8), (None, 2, "", 4), (None, 1, "3", 3), (None, 4, "3", 2), (None, 1, "4,2", 8), (5, 1, "3", 5)],
)
def test_threads_are_those_of_the_setting_or_at_most_of_the_environment(
    threads, processes, variable, taken, monkeypatch
):
    from lit_rlhf.pipeline import command

    monkeypatch.setattr(command, "cores", lambda: 8)
    monkeypatch.setattr(command.HydraConfig, "get", lambda: SimpleNamespace(mode=RunMode.RUN))
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    trainer = {"devices": processes, "accelerator": "cpu"}
    command.limit_threads(OmegaConf.create({"threads": threads, "trainer": trainer}))
    assert set_to == [taken]


@pytest.mark.parametrize("mistake", ["sft.optimizer.lrr=1", "stage=nothing", "rounds=0"])
def test_a_mistake_in_the_settings_is_found_before_torch_is_imported(lit_rlhf, tmp_path, mistake):
    code = (
        "import sys, lit_rlhf.pipeline\n"
        f"sys.argv = ['lit-rlhf', 'paths.runs={tmp_path}', {mistake!r}]\n"
        "try:\n    lit_rlhf.pipeline.main()\nexcept SystemExit as end:\n    print('ended with', end.code)\n"
        "print('imported:', *sys.modules)"
    )
    said = python(code, lit_rlhf)
    assert "ended with 2" in said
    assert not imported(said) & {"torch", "transformers", "lightning"}


def test_the_first_step_waits_for_no_import_that_it_does_not_need(lit_rlhf, tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)  # modules beside the command are found
    said = lit_rlhf("stage=pretrain", "pretrain.module._target_=probe.Probe", fresh=True).stdout
    assert {"torch", "lightning"} <= imported(said)
    assert not imported(said) & set(UNUSED)


def test_settings_are_composed_once(lit_rlhf, tmp_path):
    code = (
        "import sys, lit_rlhf.pipeline\n"
        "from hydra._internal.hydra import Hydra\n"
        "composed, compose = [], Hydra.compose_config\n"
        "def counted(*arguments, **settings):\n"
        "    composed.append(settings)\n"
        "    return compose(*arguments, **settings)\n"
        "Hydra.compose_config = counted\n"
        f"sys.argv = ['lit-rlhf', 'paths.runs={tmp_path}', 'stage=report']\n"
        "try:\n    lit_rlhf.pipeline.main()\nexcept SystemExit:\n    print('composed', len(composed))"
    )
    assert "composed 1\n" in python(code, lit_rlhf)
