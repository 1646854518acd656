"""A run's own files: each reader names what is damaged, in one line, or says what it leaves out."""

import json
import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from lit_rlhf.apps.record_file import RecordFile
from lit_rlhf.apps.run_reader import read_summary
from lit_rlhf.apps.sweep_reader import Job
from lit_rlhf.errors import UserError
from lit_rlhf.files import FORMAT, read_jsonl, read_yaml, write_yaml
from lit_rlhf.finished import check_unchanged, read_done, write_done
from lit_rlhf.pipeline.run_folder import read_settings
from lit_rlhf.pipeline.trained_prompts import read_trained_prompts
from lit_rlhf.stages.progress_file import ProgressFile
from lit_rlhf.training.checkpoint_files import read_checkpoint
from lit_rlhf.training.metrics_file import append_rows, read_metrics
from lit_rlhf.training.torch_file import write_whole

SETTINGS = {"sft": {"seed": 1}, "world": {"seed": 0}, "split": {"seed": 0}, "origin": {"recipe": "scratch"}}
RECORD = {"stage": "sft", "figures": {"val_loss": float("nan")}, "seconds": 1.5, "inputs": {}}


def written(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")


FILES = {  # name -> (writes a whole one, reads it)
    "done.json": (lambda folder: write_done(folder, RECORD, []), read_done),
    "config.yaml": (lambda folder: write_yaml(folder / "config.yaml", SETTINGS), read_settings),
    "summary.json": (lambda f: written(f, "summary.json", json.dumps({"seconds": {"sft": 1.0}}) + "\n"), read_summary),
    "metrics.csv": (
        lambda folder: written(folder, "metrics.csv", "step,a\n1,0.5\n2,0.25\n3,0.125\n"),
        lambda folder: read_metrics(folder / "metrics.csv"),
    ),
    "samples.jsonl": (
        lambda folder: [append_rows(folder / "samples.jsonl", n, [{"step": n, "text": "\u2028"}]) for n in (1, 2, 3)],
        lambda folder: append_rows(folder / "samples.jsonl", 4, []) or read_jsonl(folder / "samples.jsonl"),
    ),
    "trained_prompts.txt": (
        lambda folder: written(folder, "trained_prompts.txt", "0123456789abcdef\n" * 2),
        read_trained_prompts,
    ),
    "progress.jsonl": (
        lambda folder: [ProgressFile(folder / "progress.jsonl").add(n, ["a", "b"]) for n in (1, 2, 3)],
        lambda folder: ProgressFile(folder / "progress.jsonl", tuple[int, list[str]]).results,
    ),
    "labels-0.jsonl": (
        lambda folder: [RecordFile(folder / "labels-0.jsonl").append({"item": n}) for n in (1, 2, 3)],
        lambda folder: RecordFile(folder / "labels-0.jsonl").read(),
    ),
    "last.ckpt": (
        lambda folder: write_whole({"state_dict": {"w": torch.ones(999)}}, folder / "last.ckpt"),
        lambda folder: read_checkpoint(folder / "last.ckpt"),
    ),
}


def becomes(change):
    return lambda file: file.write_bytes(change(file.read_bytes()))


def folder_instead(file):
    file.unlink()
    file.mkdir()


def unreadable(file):
    file.unlink()
    file.symlink_to("/proc/self/mem")  # reading fails, also for the superuser


def pipe(file):
    file.unlink()
    os.mkfifo(file)


DAMAGES = {
    "cut": becomes(lambda data: data[: len(data) // 2 + 3]),
    "half a character": becomes(lambda data: data + b"\xe2\x82"),
    "random bytes": becomes(lambda data: data[: len(data) // 2] + b"\xff\x00{\x93" + data[len(data) // 2 + 4 :]),
    "wrong type": becomes(lambda data: b"[1]\n"),
    "number": becomes(lambda data: b"7\n"),
    "deep": becomes(lambda data: b"[" * 100_000 + b"\n"),
    "digits": becomes(lambda data: b"1" * 5_000 + b"\n"),
    "folder": folder_instead,
    "unreadable": unreadable,
    "pipe": pipe,
}
# Files of lines, of which a last one without its end is left out, and damages that end so.
LINES = ("samples.jsonl", "progress.jsonl", "labels-0.jsonl")
CUT = {("metrics.csv", "cut"), *((name, how) for name in LINES for how in ("cut", "half a character"))}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named(tmp_path, capsys, name, damage):
    write, read = FILES[name]
    write(tmp_path)
    whole = read(tmp_path)
    assert whole
    DAMAGES[damage](tmp_path / name)
    if (name, damage) == ("last.ckpt", "half a character"):  # what stands behind its end is not read
        assert torch.equal(read(tmp_path)["state_dict"]["w"], whole["state_dict"]["w"])
        return
    if (name, damage) in CUT:
        left = read(tmp_path)
        assert len(left) == (1 if damage == "cut" else 3) and read(tmp_path) == left
        return
    with pytest.raises(UserError) as error:
        read(tmp_path)
    said = str(error.value)
    assert said.startswith(str(tmp_path / name)) and "\n" not in said and "; " in said


@settings(max_examples=200, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(sorted(FILES)), at=st.floats(0, 1), removed=st.sampled_from([0, 1, 4, 10**9]),
    put=st.binary(max_size=6) | st.text("0123456789{}[]\",:.-eEnul\n", max_size=6).map(str.encode),
)  # fmt: skip
def test_bytes_put_anywhere_are_read_or_named(tmp_path, ends_well, name, at, removed, put):
    write, read = FILES[name]
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    write(tmp_path)
    data = (tmp_path / name).read_bytes()
    place = int(at * len(data))
    (tmp_path / name).write_bytes(data[:place] + put + data[place + removed :])
    with ends_well(naming=name):
        read(tmp_path)


def test_nothing_there_is_nothing(tmp_path):
    for name, (_, read) in FILES.items():
        if name != "last.ckpt":
            assert not read(tmp_path)


def test_a_run_of_a_newer_version_is_refused_and_of_an_older_one_read(tmp_path):
    write_done(tmp_path, RECORD, [])
    write_yaml(tmp_path / "config.yaml", SETTINGS)
    assert read_done(tmp_path)["format"] == read_settings(tmp_path)["format"] == FORMAT
    for name, read in (("done.json", read_done), ("config.yaml", read_settings)):
        text = (tmp_path / name).read_text()
        for old, new in ((f'"format": {FORMAT}', '"format": 9'), (f"format: {FORMAT}", "format: 9")):
            text = text.replace(old, new)
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=rf"{name}: written by a newer version of lit_rlhf \(format 9"):
            read(tmp_path)
    (tmp_path / "done.json").write_text(json.dumps({"figures": {}, "seconds": 2.0}))  # before there were formats
    (tmp_path / "config.yaml").write_text("world: {seed: 3}\n")
    assert read_done(tmp_path)["seconds"] == 2.0 and read_done(tmp_path)["files"] == {}
    assert read_yaml(tmp_path / "config.yaml") == {"world": {"seed": 3}}
    (tmp_path / "done.json").write_text(json.dumps({"format": FORMAT, "figures": {}}))
    with pytest.raises(UserError, match=r"done.json: damaged \(no stage\)"):
        read_done(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", '{"status": 3, "overrides": []}', "[1]"])
def test_a_damaged_job_of_a_sweep_is_a_failed_one(tmp_path, text):
    (tmp_path / "job.json").write_text(text)
    job = Job(tmp_path)
    assert not job.done and "job.json" in job.error and job.objective[0] == "objective"


def test_an_objective_of_zero_is_a_number(tmp_path):
    (tmp_path / "job.json").write_text('{"status": "done", "overrides": [], "objective": "ppo.kl", "value": 0.0}')
    assert Job(tmp_path).objective == ("ppo.kl", 0.0)


def test_what_a_stage_that_has_not_ended_left_is_named(tmp_path, capsys):
    (tmp_path / "model").mkdir()
    check_unchanged(tmp_path / "model")  # of nobody's stage
    assert capsys.readouterr().out == ""
    write_yaml(tmp_path / "config.yaml", SETTINGS)
    check_unchanged(tmp_path / "model")
    assert f"{tmp_path / 'model'}: its stage has not ended (done.json is not there)" in capsys.readouterr().out
    write_done(tmp_path, RECORD, [])
    check_unchanged(tmp_path / "model")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("file", ["model-00002.safetensors", "adapter/adapter_model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("how", ["changed", "cut", "gone"])
def test_what_a_finished_stage_left_is_compared(tmp_path, file, how):
    part = "adapter" if "/" in file else "model"
    changed = tmp_path / part / file.rpartition("/")[2]
    for name in ("model-00001.safetensors", "model-00002.safetensors", "tokenizer.json", "adapter_model.safetensors"):
        for folder in ("model", "adapter", "checkpoints"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / name).write_bytes(b"0123456789")
    write_done(tmp_path, RECORD, [])
    (tmp_path / "checkpoints" / "tokenizer.json").unlink()  # nobody needs it any more
    for name in ("model", "adapter"):
        check_unchanged(tmp_path / name)
    if how == "gone":
        changed.unlink()
    else:
        changed.write_bytes(b"0123456780" if how == "changed" else b"0123")
    with pytest.raises(UserError, match=rf"{changed}: {'gone' if how == 'gone' else 'changed'}.* since stage"):
        check_unchanged(tmp_path / part)
    check_unchanged(tmp_path / ("model" if part == "adapter" else "adapter"))
