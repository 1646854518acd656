"""Loggers and callbacks of Lightning that are chosen by settings."""

import csv
import json
import shutil

import pytest

from lit_rlhf.training import read_metrics

SFT = ["stage=sft", "from_run=quickstart", "debug=fast", "callbacks.progress_bar=false", "threads=1"]
EARLY = ["callbacks=[early_stopping,lr_monitor]", "sft.trainer.val_check_interval=2"]


@pytest.fixture
def runs(finished_run, tmp_path):
    shutil.copytree(finished_run / "runs", tmp_path / "runs")
    return tmp_path / "runs"


def test_several_loggers_and_callbacks_at_once(lit_rlhf, runs):
    done = lit_rlhf(
        *SFT, *EARLY, "run=logged", "logger=[wandb,tensorboard]", "callbacks.early_stopping.monitor=val/sft/loss",
        "callbacks.early_stopping.min_delta=9", "sft.trainer.max_epochs=20", "sft.trainer.log_every_n_steps=1",
        fast=False,
    )  # fmt: skip
    assert done.stderr == ""
    folder = runs / "logged" / "sft"
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert list(folder.glob("tensorboard/events.out.tfevents.*"))
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert any(value for row in rows for name, value in row.items() if name.startswith("lr-"))
    assert int(rows[-1]["step"]) == 8  # three validations that were no better by 9, and one to be better than
    assert (folder / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            [*EARLY, "callbacks.early_stopping.monitor=val/sft/los"],
            "callbacks: EarlyStopping watches val/sft/los, which sft does not log; take one of val/sft/loss",
        ),
        (
            ["callbacks=early_stopping", "callbacks.early_stopping.monitor=val/reward/loss"],
            "callbacks.early_stopping.monitor=val/reward/loss: no metric of a stage that runs; one of sft was expected",
        ),
        (["logger=tensorboard", "+logger.tensorboard.nme=x"], "unexpected keyword argument 'nme'"),
    ],
    ids=["metric", "stage", "argument"],
)
def test_what_cannot_be_is_said_before_training(lit_rlhf, runs, settings, said):
    done = lit_rlhf(*SFT, "run=wrong", *settings, fast=False, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert said in done.stderr
    assert not (runs / "wrong/sft/checkpoints/last.ckpt").exists()


def test_a_callback_of_another_stages_metric_is_left_out(lit_rlhf, runs):
    early = [
        "callbacks=early_stopping",
        "callbacks.early_stopping.monitor=val/reward/loss",
        "reward.trainer.max_epochs=9",
    ]
    early += ["callbacks.early_stopping.min_delta=9", "reward.trainer.val_check_interval=1"]
    lit_rlhf(*SFT[1:], *early, "stage=[sft,reward]", "run=other", fast=False)
    figures = json.loads((runs / "other" / "summary.json").read_text())
    steps = [int(max(read_metrics(runs / "other" / stage / "metrics.csv"))) for stage in ("sft", "reward")]
    assert figures["sft"] and steps[0] > steps[1] == 4
