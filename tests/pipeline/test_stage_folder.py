"""Where a stage is written: one writer at a time, and what is there stays until what takes its place is whole."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import product
from pathlib import Path

import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.models import checkpoint
from lit_rlhf.pipeline.command import prepare
from lit_rlhf.pipeline.run import run_stage
from lit_rlhf.pipeline.run_folder import register_resolvers
from lit_rlhf.pipeline.runner import settle
from lit_rlhf.pipeline.settings import compose_settings
from lit_rlhf.pipeline.stage_folder import StageFolder
from lit_rlhf.stages import EvaluateModule, PreferenceModule
from lit_rlhf.training import read_metrics


@pytest.fixture
def folder(tmp_path):
    """(settings) -> the folder of SFT in the run ``quickstart``."""
    register_resolvers()
    return lambda *settings: StageFolder(settings_of(tmp_path, *settings), "sft")


def settings_of(folder, *settings):
    cfg = compose_settings([f"paths.runs={folder}/runs", "debug=fast", *settings])
    prepare(cfg)
    return cfg


def result(folder, text, then=lambda: None):
    """A finished stage, whose model is one file; ``then`` is called before it is put in its place."""
    folder.begin()
    (folder.path / "model").mkdir(exist_ok=True)
    (folder.path / "model" / "model.safetensors").write_text(text)
    then()
    folder.finish({"figures": {}, "seconds": 1.0})


def test_the_old_result_stays_until_the_new_one_is_whole(folder, tmp_path):
    sft, model = tmp_path / "runs/quickstart/sft", tmp_path / "runs/quickstart/sft/model/model.safetensors"
    result(folder(), "old")
    again = folder("overwrite=true", "sft.optimizer.lr=1e-3")
    again.begin()
    (again.path / "model").mkdir()
    assert model.read_text() == "old" and (sft / "done.json").is_file()
    result(again, "new")
    assert model.read_text() == "new" and again.path == sft and sorted(os.listdir(sft.parent)) == ["sft"]
    assert folder("sft.optimizer.lr=1e-3").check()


def test_an_interrupted_overwrite_goes_on_and_one_by_other_settings_begins_anew(folder):
    result(folder(), "old")
    first = folder("overwrite=true")
    first.begin()
    (first.path / "checkpoints").mkdir()
    (first.path / "checkpoints" / "last.ckpt").touch()
    second = folder("overwrite=true")
    second.begin()
    assert second.checkpoint is not None
    third = folder("overwrite=true", "sft.optimizer.lr=1e-3")
    third.begin()
    assert third.checkpoint is None and (third.place / "model" / "model.safetensors").read_text() == "old"


class Killed(BaseException):
    pass


class Killing:
    """Lets some calls through, once it has begun, and kills at the next."""

    def __init__(self, calls):
        self.left, self.begun = calls, False

    def begin(self):
        self.begun = True

    def call(self, function):
        def killing(*arguments, **settings):
            self.left -= self.begun
            if self.left < 0:
                raise Killed
            return function(*arguments, **settings)

        return killing


def test_a_start_that_is_killed_while_it_exchanges_folders_is_brought_to_its_end(tmp_path, monkeypatch):
    """Before each of the calls that move or remove a folder, with and without an exchange in one step."""
    register_resolvers()
    once = settings_of(tmp_path)
    other = settings_of(tmp_path, "sft.optimizer.lr=1e-3")
    again = settings_of(tmp_path, "sft.optimizer.lr=1e-3", "overwrite=true")
    for number, (atomic, moment, cfg) in enumerate(product([True, False], range(4), [other, again])):
        for settings in (once, other, again):
            settings.paths.runs = f"{tmp_path}/{number}"
        result(StageFolder(once, "sft"), "old")
        with monkeypatch.context() as patch, suppress(Killed):
            killing = Killing(moment)
            patch.setattr(Path, "rename", killing.call(Path.rename))
            patch.setattr(shutil, "rmtree", killing.call(shutil.rmtree))
            patch.setattr(checkpoint, "_swapped", killing.call(checkpoint._swapped) if atomic else lambda *_: False)
            result(StageFolder(again, "sft"), "new", then=killing.begin)
        settle(cfg)
        after = StageFolder(cfg, "sft")
        model = (after.place / "model" / "model.safetensors").read_text()
        if cfg is other:
            assert after.check() and model == "new" and os.listdir(after.run) == ["sft"]
        else:  # it goes on where it was, or anew; what is there meanwhile is whole
            assert model in ("old", "new") and (after.place / "done.json").is_file()
            assert not (after.run / "sft.old").exists()


def test_a_stage_goes_on_in_other_processes_that_take_as_large_steps(folder):
    """The place of a checkpoint is in examples; see tests/stages/test_processes.py."""
    eight = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    stage = folder("sft.data.batch_size=16")
    stage.begin()
    (stage.path / "checkpoints").mkdir()
    (stage.path / "checkpoints" / "last.ckpt").write_text("")
    assert not folder("sft.data.batch_size=8", *eight).check()
    assert not folder("sft.data.batch_size=4", *eight, "trainer.num_nodes=2", "trainer.strategy=auto").check()
    with pytest.raises(UserError, match=r"sft.data.batch_size times processes was 16, now 32"):
        folder("sft.data.batch_size=16", *eight).check()
    with pytest.raises(UserError, match=r"sft.data.batch_size times processes was 16, now 8"):
        folder("sft.data.batch_size=8").check()


def test_a_stage_that_would_replace_what_it_starts_from_is_refused(folder, tmp_path):
    result(folder(), "old")
    own = f"sft.policy.path={tmp_path}/runs/quickstart/sft/model"
    with pytest.raises(UserError, match=r"^sft\.policy\.path=.*: overwrite=true replaces .*; choose another run="):
        folder("overwrite=true", own).check()


def test_files_of_a_stage_are_written_where_the_stage_is(folder, tmp_path):
    own = f"{tmp_path}/runs/quickstart/sft"
    data = ["sft/data=jsonl", f"sft.data.path={own}/rows.jsonl"]
    again = folder("overwrite=true", f"sft.policy.path={own}/model", *data)
    settings = again.written_here()
    assert settings["policy"]["path"] == f"{own}/model"  # read before it is replaced
    assert settings["data"]["path"] == f"{own}.new/rows.jsonl"
    assert again.settings["sft"]["data"]["path"] == f"{own}/rows.jsonl"


def test_one_command_writes_a_stage_and_the_other_says_who(folder):
    first = folder()
    with (
        first.held(),
        pytest.raises(UserError, match=rf"sft is being written by process {os.getpid()} on \S+ since \d{{4}}-"),
        folder("overwrite=true").held(),
    ):
        raise AssertionError("two hold one lock")
    with folder().held():
        assert os.listdir(first.run) == [".sft.lock"]
    assert os.listdir(first.run) == []


def test_the_lock_of_a_killed_command_is_taken_over(folder):
    run = folder().run
    run.mkdir(parents=True)
    code = (
        f"from filelock import FileLock; import pathlib, time; lock = FileLock(r'{run}/.sft.lock'); lock.acquire();"
        f"pathlib.Path(r'{run}/.sft.lock').write_text('process 1'); print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="is being written by process 1;"), folder().held():
        pass
    holder.kill()
    holder.wait()
    with folder().held():
        assert str(os.getpid()) in (run / ".sft.lock").read_text()


def test_where_files_cannot_be_locked_a_line_says_so(folder, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with folder().held():
        pass
    assert "cannot be locked ([Errno 37] No locks available)" in capsys.readouterr().out


@pytest.fixture
def run_copy(finished_run, tmp_path):
    shutil.copytree(finished_run / "runs", tmp_path / "runs")
    return tmp_path / "runs" / "quickstart"


def test_bad_data_destroys_nothing(lit_rlhf, run_copy, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "no response"}\n')
    before = {file: file.read_bytes() for file in run_copy.rglob("*") if file.is_file()}
    done = lit_rlhf("stage=sft", "overwrite=true", "sft/data=jsonl", "sft.data.path=bad.jsonl", check=False)
    assert done.returncode == 2 and "bad.jsonl:1" in done.stderr
    assert {file: file.read_bytes() for file in before} == before


def test_a_folder_that_goes_while_it_trains_is_rescued(lit_rlhf, run_copy, tmp_path, same_weights):
    more = ["stage=sft", "from_run=quickstart", "sft.trainer.max_epochs=8", "sft.checkpoint_every=1000"]
    lit_rlhf(*more, "run=whole")
    for how in ("deleted", "renamed"):
        lost = run_copy.parent / how
        command = lit_rlhf.command(*more, f"run={how}")
        process = subprocess.Popen(command, cwd=tmp_path, env=lit_rlhf.env, stderr=subprocess.PIPE, text=True)
        while not (lost / "sft" / "checkpoints").is_dir() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(0.5)
        process.send_signal(signal.SIGSTOP)  # or the training may end before the folder has gone
        shutil.rmtree(lost) if how == "deleted" else lost.rename(tmp_path / "elsewhere")
        process.send_signal(signal.SIGCONT)
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 2 and said.count("\n") == 1
        assert f"was deleted or renamed while it was written; the last step is saved in runs/{how}-rescue/sft" in said
        assert "goes on from" in lit_rlhf(*more, f"run={how}-rescue").stdout
        stages = [run_copy.parent / run / "sft" for run in (f"{how}-rescue", "whole")]
        assert same_weights(*stages)
        assert read_metrics(stages[0] / "metrics.csv") == read_metrics(stages[1] / "metrics.csv")
        figures = [json.loads((stage / "done.json").read_text())["figures"] for stage in stages]
        assert figures[0] == figures[1]


@pytest.mark.parametrize(
    ("stage", "how"), [("preference", "deleted"), ("preference", "renamed"), ("evaluate", "deleted")]
)
def test_what_a_stage_samples_whose_folder_goes_meanwhile_is_kept(run_copy, tmp_path, monkeypatch, stage, how):
    register_resolvers()
    quiet = ["logger=csv", "callbacks.progress_bar=false"]
    cfg = settings_of(tmp_path, f"stage={stage}", "run=lost", "from_run=quickstart", *quiet)
    lost, module = run_copy.parent / "lost", {"preference": PreferenceModule, "evaluate": EvaluateModule}[stage]
    step = "predict_step" if stage == "preference" else "test_step"
    sample = getattr(module, step)

    def sample_and_lose(self, batch, batch_idx):
        result = sample(self, batch, batch_idx)
        if (lost / stage / "config.yaml").exists():
            shutil.rmtree(lost) if how == "deleted" else lost.rename(tmp_path / "elsewhere")
        return result

    monkeypatch.setattr(module, step, sample_and_lose)
    with pytest.raises(UserError, match=r"was deleted or renamed .*; what came out is in .*lost-rescue"):
        run_stage(cfg, stage)
    done = [json.loads((run / stage / "done.json").read_text()) for run in (run_copy, run_copy.parent / "lost-rescue")]
    assert done[0]["figures"] == done[1]["figures"]
    kept = "data/rankings-0.jsonl" if stage == "preference" else "evaluate/samples.jsonl"
    assert (run_copy / kept).read_text() == (run_copy.parent / "lost-rescue" / kept).read_text()
