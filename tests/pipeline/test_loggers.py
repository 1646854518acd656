"""Loggers and callbacks of Lightning that are chosen by settings."""

import csv
import json
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import time

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from lit_rlhf.errors import UserError
from lit_rlhf.training import WandbRun, read_metrics

SFT = ["stage=sft", "from_run=quickstart", "debug=fast", "callbacks.progress_bar=false", "threads=1"]
EARLY = ["callbacks=[early_stopping,lr_monitor]", "sft.trainer.val_check_interval=2"]


@pytest.fixture
def runs(finished_run, tmp_path):
    shutil.copytree(finished_run / "runs", tmp_path / "runs")
    return tmp_path / "runs"


def logged(folder):
    """The records of the one offline run of a folder: leveldb's form of a log, in blocks of 32 KiB."""
    [file] = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, whole, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            records.append(Record.FromString(whole))
            whole = b""
    return records


def history(records, name):
    """(step, value) of each time that a metric was logged."""
    items = [r.history.item for r in records if r.HasField("history")]
    rows = [{"/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in items]
    return [(row["trainer/global_step"], row[name]) for row in rows if name in row]


def test_an_interrupted_stage_is_one_run_of_wandb_with_all_steps(lit_rlhf, runs, tmp_path):
    settings = [
        *SFT, "run=wb", "logger=wandb", "logger.wandb.tags=[a]", "sft.trainer.max_epochs=3", "sft.checkpoint_every=1",
        "sft.trainer.log_every_n_steps=1",
    ]  # fmt: skip
    folder = runs / "wb" / "sft"
    for begun in range(2):
        command = [sys.executable, "-m", "lit_rlhf", *settings]
        process = subprocess.Popen(command, cwd=tmp_path, env=lit_rlhf.env, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        before = (folder / "metrics.csv").read_text() if begun else ""
        while not (folder / "checkpoints/last.ckpt").exists() or before == (folder / "metrics.csv").read_text():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL if begun else signal.SIGTERM)
        process.wait()
    lit_rlhf(*settings, fast=False)
    records = logged(folder)
    [run] = [r.run for r in records if r.HasField("run")]
    assert (run.job_type, [*run.tags], run.run_group) == ("sft", ["a"], "wb")
    for name in ("sft/loss", "val/sft/loss"):
        rows = {step: row[name] for step, row in read_metrics(folder / "metrics.csv").items() if name in row}
        assert len(rows) > (10 if name == "sft/loss" else 1)
        assert history(records, name) == sorted(rows.items())
    tables = [item.nested_key[-1] for r in records for item in r.history.item if item.nested_key[0] == "samples"]
    steps = {json.loads(line)["step"] for line in (folder / "samples.jsonl").read_text().splitlines()}
    assert tables.count("nrows") == len(steps) > 1
    report = logged(runs / "wb")  # a run of its own
    assert [r.artifact.name for r in report if r.HasField("artifact")] == ["wb-report"]
    assert [r.run.job_type for r in report if r.HasField("run")] == ["report"]
    assert (
        history(report, "sft.val_loss")[0][1] == json.loads((runs / "wb/summary.json").read_text())["sft"]["val_loss"]
    )


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


def test_a_stage_is_one_run_of_trackio(lit_rlhf, runs, monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))
    done = lit_rlhf(
        *SFT, "run=seen", "logger=trackio", "sft.trainer.log_every_n_steps=1", "sft.trainer.max_steps=3", fast=False
    )
    assert "rackio" not in done.stdout and done.stderr == ""
    with sqlite3.connect(tmp_path / "kept" / "lit_rlhf.db") as file:
        rows = [(step, json.loads(row)) for step, row in file.execute("SELECT step, metrics FROM metrics")]
        assert file.execute("SELECT DISTINCT run_name FROM metrics").fetchall() == [("seen/sft",)]
        assert len(file.execute("SELECT DISTINCT run_id FROM metrics").fetchall()) == 1
        [(config,)] = file.execute("SELECT config FROM configs").fetchall()
    assert json.loads(config)["sft"]["module"]["_target_"] == "lit_rlhf.stages.SFTModule"
    assert [step for step, row in rows if "sft/loss" in row] == [0, 1, 2]
    assert any("summary/val_loss" in row for _, row in rows)


@pytest.mark.parametrize("text", [b"*\n", b"../..", b"a b", b"\xff\xfe"])
def test_a_damaged_id_of_a_run_is_named_and_no_folder_removed(tmp_path, text):
    (tmp_path / "wandb/offline-run-1-abcd").mkdir(parents=True)
    (tmp_path / "wandb/run_id").write_bytes(text)
    with pytest.raises(UserError, match=r"run_id(:1)?: damaged .*delete it: W&B then has"):
        WandbRun(str(tmp_path), "run/sft", "sft", "offline")
    assert (tmp_path / "wandb/offline-run-1-abcd").is_dir()


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


def test_a_profile_is_printed_and_kept(lit_rlhf, runs):
    done = lit_rlhf(*SFT, "run=timed", "logger=csv", "profiler=simple", fast=False)
    file = runs / "timed/sft/profile/fit-simple.txt"
    assert "run_training_batch" in file.read_text() and f"profile: runs/{file.relative_to(runs)}" in done.stdout
    assert "FIT Profiler Report" in done.stdout
