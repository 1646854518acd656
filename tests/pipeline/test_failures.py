"""Whatever is raised ends the command with one line; where it happened is kept."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import GPT2LMHeadModel

from lit_rlhf import __version__
from lit_rlhf.errors import UserError
from lit_rlhf.models.loading import read_pretrained
from lit_rlhf.pipeline.failures import DEBUG, code_of, reason
from lit_rlhf.pipeline.run import make_trainer

BROKEN = """
from lit_rlhf.stages import PretrainModule

class Broken(PretrainModule):
    def on_train_batch_start(self, batch, batch_idx):
        raise {raised}
"""


@pytest.mark.parametrize(
    ("raised", "said", "code"),
    [
        ("ZeroDivisionError('two\\nlines')", "unexpected ZeroDivisionError: two lines", 1),
        ("OSError(28, 'No space left on device', 'x.bin')", "x.bin: No space left on device", 2),
    ],
)
def test_what_nobody_expected_is_one_line_and_its_traceback_is_kept(lit_rlhf, tmp_path, raised, said, code):
    (tmp_path / "broken.py").write_text(BROKEN.format(raised=raised))
    command = ["stage=pretrain", "pretrain.module._target_=broken.Broken"]
    done = lit_rlhf(*command, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert said in done.stderr and "runs/quickstart/error.log" in done.stderr
    assert "in on_train_batch_start" in (tmp_path / "runs/quickstart/error.log").read_text()
    assert "in on_train_batch_start" in lit_rlhf(*command, check=False, env={DEBUG: "1"}).stderr


@pytest.mark.parametrize("allocate", [lambda: bytearray(2**62), lambda: torch.empty(2**50)], ids=["python", "torch"])
def test_memory_that_runs_out_is_called_so(allocate):
    with pytest.raises((MemoryError, RuntimeError)) as found:
        allocate()
    assert reason(found.value).startswith("memory ran out") and "stage=plan" in reason(found.value)


def test_memory_that_runs_out_while_a_model_is_read_is_called_so(tmp_path, monkeypatch):
    def starved(*_, **__):
        raise OSError("Cannot allocate memory (os error 12)")

    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    monkeypatch.setattr(GPT2LMHeadModel, "from_pretrained", starved)
    with pytest.raises(UserError) as found:
        read_pretrained(GPT2LMHeadModel, tmp_path, "float32")
    assert reason(found.value).startswith("memory ran out (Cannot allocate memory")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--foo"],
        ["--cfg", "foo"],
        ["--config-dir=/nowhere"],
        ["-cn", "nothing"],
        ["-m", "stage=null,pretrain"],
        ["--cfg", "job", "stage=null"],
    ],
)
def test_options_that_are_none_are_one_line(lit_rlhf, arguments):
    done = lit_rlhf(*arguments, check=False, fast=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


def test_a_name_that_is_too_long_is_one_line_which_names_its_setting(monkeypatch):
    with pytest.raises(OSError) as error:
        Path("a" * 300).read_text()
    assert code_of(error.value) == 2 and reason(error.value).startswith("aaa")
    monkeypatch.setattr("sys.argv", ["lit-rlhf", "seed=1", f"sft.data.path=./{'a' * 300}"])
    assert reason(error.value).startswith("sft.data.path: aaa") and reason(error.value).endswith(
        "...: File name too long"
    )


def test_what_lightning_has_against_a_trainer_names_the_stage():
    trainer = OmegaConf.create({"_target_": "lit_rlhf.training.trainer.make_trainer", "strategy": "nonsense"})
    with pytest.raises(UserError, match=r"^sft\.trainer: You selected an invalid strategy name: `strategy='nonsense'`"):
        make_trainer("sft", trainer)


def test_what_a_terminal_would_obey_or_not_show_is_escaped():
    assert reason(UserError("a\x1b[2J\udcff\nb")) == r"a\x1b[2J\udcff b"


@pytest.mark.parametrize("stage", ["report", "chat", "label"])
def test_the_name_of_no_run_leaves_no_folder(lit_rlhf, tmp_path, stage):
    done = lit_rlhf(f"stage={stage}", "run=typo", fast=False, check=False)
    assert done.returncode == 2 and "runs/typo" in done.stderr
    assert [*tmp_path.glob("runs/*")] == []


def test_the_version_is_our_own(lit_rlhf):
    assert lit_rlhf("--version", fast=False).stdout.startswith(f"lit-rlhf {__version__} (Hydra ")
