"""The command, as a user types it."""

import csv
import json
import math
import shutil
import signal
import subprocess
import time

import pytest
import yaml

from lit_rlhf.training import read_metrics
from lit_rlhf.training.notices import one_line

STAGES = ("pretrain", "sft", "preference", "reward", "ppo", "evaluate")


@pytest.fixture
def run_copy(finished_run, tmp_path):
    """A finished run that may be changed."""
    shutil.copytree(finished_run / "runs", tmp_path / "runs")
    return tmp_path / "runs" / "quickstart"


def test_run_folder_holds_what_it_promises(finished_run):
    run = finished_run / "runs" / "quickstart"
    for stage in STAGES:
        assert {"config.yaml", "done.json"} <= {f.name for f in (run / stage).iterdir()}
    for stage in ("pretrain", "sft", "reward", "ppo"):
        names = {f.name for f in (run / stage).iterdir()}
        assert {"model", "checkpoints", "metrics.csv"} <= names
        assert (run / stage / "checkpoints" / "last.ckpt").is_file()
        assert (run / stage / "model" / "model.safetensors").is_file()
        assert (run / stage / "model" / "chat_template.jinja").is_file()
    assert (run / "data" / "rankings-0.jsonl").is_file()
    assert (run / "report.html").is_file()
    assert not list(run.rglob("*.tmp"))
    for stage in ("pretrain", "sft", "ppo", "evaluate"):
        assert (run / stage / "samples.jsonl").is_file()


def test_summary_holds_the_headline_figures(finished_run):
    summary = json.loads((finished_run / "runs" / "quickstart" / "summary.json").read_text())
    assert summary["seed"] == 0
    assert set(summary["seconds"]) == {*STAGES, "total"}
    assert set(summary["peak_mib"]) == {*STAGES}
    for stage, peak in summary["peak_mib"].items():
        done = json.loads((finished_run / "runs" / "quickstart" / stage / "done.json").read_text())
        assert 100 < done["memory"]["before_mib"] <= peak == done["memory"]["peak_mib"] < 8000
    assert {"val_loss_first", "val_loss", "tokens"} <= set(summary["pretrain"])
    assert summary["pretrain"]["val_loss"] < summary["pretrain"]["val_loss_first"]
    assert "val_loss" in summary["sft"]
    assert {"val_accuracy", "gold_accuracy"} <= set(summary["reward"])
    assert {"score_first", "score_last", "kl", "entropy", "episodes"} <= set(summary["ppo"])
    for name in ("base", "sft", "ppo"):
        assert {"gold", "correct", "polite", "words", "entropy"} <= set(summary["evaluate"]["models"][name])
    assert 0 <= summary["evaluate"]["models"]["sft"]["greedy_right"] <= 1
    for versus in ("sft_vs_base", "ppo_vs_sft"):
        rate = summary["evaluate"]["win_rate"][versus]
        assert rate["low"] <= rate["mean"] <= rate["high"]
        assert (rate["n"], rate["prompts"]) == (32, 16)
    assert "best_of_n" in summary["evaluate"]


def test_metrics_have_their_fixed_names(finished_run):
    run = finished_run / "runs" / "quickstart"
    names = {stage: {n for row in read_metrics(run / stage / "metrics.csv").values() for n in row}
             for stage in ("pretrain", "sft", "reward", "ppo")}  # fmt: skip
    assert {"val/pretrain/loss"} <= names["pretrain"]
    assert {"val/reward/accuracy", "val/reward/gold_accuracy"} <= names["reward"]
    assert {"ppo/score", "ppo/reward", "ppo/kl", "ppo/loss", "ppo/policy_loss", "ppo/value_loss", "ppo/entropy",
            "ppo/clip_fraction", "ppo/explained_variance", "val/ppo/win_rate"} <= names["ppo"]  # fmt: skip


def test_same_command_again_skips_what_is_finished(lit_rlhf, run_copy):
    before = (run_copy / "sft" / "done.json").read_text()
    said = lit_rlhf().stdout
    assert said.count("finished already") == 6
    assert (run_copy / "sft" / "done.json").read_text() == before


def test_changed_settings_are_named_and_nothing_is_lost(lit_rlhf, run_copy):
    done = lit_rlhf("ppo.module.kl_coef=0.5", check=False)
    assert done.returncode == 2
    assert "ppo.module.kl_coef was 0.08, now 0.5" in done.stderr
    assert "from_run=quickstart" in done.stderr and "overwrite=true" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert (run_copy / "ppo" / "done.json").is_file()


def test_another_run_starts_from_the_models_of_the_first(lit_rlhf, run_copy):
    lit_rlhf("stage=ppo", "run=other", "from_run=quickstart", "ppo.module.kl_coef=0.5", "seed=7")
    other = run_copy.parent / "other"
    settings = yaml.safe_load((other / "ppo" / "config.yaml").read_text())
    assert settings["world"]["seed"] == 0  # the questions stay those of the first run
    assert settings["ppo"]["seed"] == 7
    assert sorted(f.name for f in other.iterdir()) == ["ppo", "report.html", "summary.json"]


def test_dpo_starts_from_the_rankings_and_models_of_another_run(lit_rlhf, run_copy):
    lit_rlhf("stage=[dpo,evaluate]", "run=other", "from_run=quickstart")
    other = run_copy.parent / "other"
    summary = json.loads((other / "summary.json").read_text())
    assert summary["dpo"]["val_loss_first"] == pytest.approx(math.log(2))
    assert {"val_loss", "val_accuracy", "gold_accuracy", "val_pairs"} <= set(summary["dpo"])
    assert set(summary["evaluate"]["models"]) == {"base", "prompted", "sft", "ppo", "dpo"}
    assert {"dpo_vs_sft", "dpo_vs_ppo"} <= set(summary["evaluate"]["win_rate"])
    dpo = summary["evaluate"]["models"]["dpo"]
    # A mean over n sampled answers, which may come out below 0: below -t with a chance of exp(-n t) at most (Markov).
    assert dpo["kl"] != 0 and dpo["answers"] * dpo["kl"] > math.log(1e-6)
    names = {name for row in read_metrics(other / "dpo" / "metrics.csv").values() for name in row}
    assert {"val/dpo/loss", "val/dpo/accuracy", "val/dpo/gold_accuracy"} <= names
    assert (other / "dpo" / "samples.jsonl").is_file()
    inputs = json.loads((other / "dpo" / "done.json").read_text())["inputs"]
    assert set(inputs) == {"../quickstart/sft/model", "../quickstart/data/rankings-0.jsonl"}


def test_overwritten_upstream_is_noticed(lit_rlhf, run_copy):
    lit_rlhf("stage=sft", "overwrite=true", "sft.optimizer.lr=5e-3")
    done = lit_rlhf("stage=preference", check=False)
    assert done.returncode == 2
    assert "was made from another sft" in done.stderr


def test_missing_upstream_says_what_to_run(lit_rlhf):
    done = lit_rlhf("stage=ppo", check=False)
    assert done.returncode == 2
    assert "Run stage=sft first" in done.stderr and "ppo.policy.path=" in done.stderr
    assert "Traceback" not in done.stderr


def test_unwritable_folder(lit_rlhf, tmp_path):
    (tmp_path / "file").touch()
    done = lit_rlhf("paths.runs=file", check=False)
    assert (done.returncode, "cannot be written to" in done.stderr) == (2, True)


@pytest.mark.parametrize(("stage", "how"), [("sft", signal.SIGINT), ("ppo", signal.SIGKILL)])
def test_stopped_run_goes_on_to_the_same_weights(lit_rlhf, run_copy, finished_run, same_weights, stage, how):
    shutil.rmtree(run_copy / stage)
    more = ["sft.trainer.max_epochs=8", "ppo.trainer.limit_train_batches=12"]
    folder = run_copy.parent / "stopped" / stage
    command = lit_rlhf.command(f"stage={stage}", "run=stopped", "from_run=quickstart", *more)
    said = stopped(command, how, folder, lit_rlhf, run_copy)
    assert not (folder / "done.json").exists()
    if how == signal.SIGINT:
        assert "run the same command again" in said and "Traceback" not in said
    again = lit_rlhf(f"stage={stage}", "run=stopped", "from_run=quickstart", *more)
    assert "goes on from" in again.stdout
    lit_rlhf(f"stage={stage}", "run=whole", "from_run=quickstart", *more)
    assert same_weights(folder, run_copy.parent / "whole" / stage)
    whole = read_metrics(run_copy.parent / "whole" / stage / "metrics.csv")
    assert read_metrics(folder / "metrics.csv") == whole


def stopped(command, how, folder, lit_rlhf, run_copy):
    """Start a command, send the signal ``how`` some steps after its first checkpoint in ``folder``; what it said."""
    process = subprocess.Popen(
        command, cwd=run_copy.parents[1], env=lit_rlhf.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "last.ckpt").is_file() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(how)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    return said


def test_ctrl_c_ends_a_sweep_which_can_go_on(lit_rlhf, run_copy):
    asked = ["-m", "stage=sft", "run=swept", "from_run=quickstart", "sft.trainer.max_epochs=8", "seed=1,2"]
    sweep = run_copy.parent / "swept" / "sweeps" / "one"
    asked.append(f"hydra.sweep.dir={sweep}")
    said = stopped(lit_rlhf.command(*asked), signal.SIGINT, sweep / "0" / "sft", lit_rlhf, run_copy)
    assert f"add hydra.sweep.dir={sweep} to the same command" in said and "Traceback" not in said
    assert not (sweep / "1").exists()
    assert "goes on from" in lit_rlhf(*asked).stdout
    assert [row["status"] for row in csv.DictReader((sweep / "sweep.csv").open())] == ["done", "done"]


def test_sweep_ends_in_one_table(lit_rlhf, run_copy):
    said = lit_rlhf("-m", "stage=ppo", "ppo.module.kl_coef=0.02,0.1", "seed=1,2").stdout
    folder = next((run_copy / "sweeps").iterdir())
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert [(r["ppo.module.kl_coef"], r["seed"], r["status"]) for r in rows] == [
        (kl, seed, "done") for kl in ("0.02", "0.1") for seed in ("1", "2")
    ]
    assert all(0 <= float(r["ppo.win_rate.mean"]) <= 1 for r in rows)
    assert (folder / "sweep.png").stat().st_size > 5000
    assert "ppo.win_rate.mean" in said
    for job in range(4):
        assert (folder / str(job) / "ppo" / "model" / "model.safetensors").is_file()
    assert not (run_copy / "ppo" / "config.yaml.tmp").exists()


def test_failed_job_is_named_and_takes_nobody_along(lit_rlhf, run_copy):
    done = lit_rlhf("-m", "stage=ppo", "ppo.optimizer.lr=1e-4,1e30", check=False)
    folder = next((run_copy / "sweeps").iterdir())
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert [r["status"] for r in rows] == ["done", "failed"]
    assert done.returncode == 1
    assert "job 1 (" in done.stdout and "failed: ppo: at step" in done.stdout


def test_objective_is_what_a_sweeper_gets_and_one_that_is_not_there_ends_the_sweep(lit_rlhf, run_copy):
    sweep = "-m", "stage=ppo", "seed=1,2", "hydra.sweep.dir=swept"
    done, folder = lit_rlhf(*sweep, "objective=ppo.kkl", check=False), run_copy.parents[1] / "swept"
    assert done.returncode == 2 and "objective=ppo.kkl: there is no such number" in done.stderr
    assert "the sweep ends here; to go on, add hydra.sweep.dir=swept to the same command" in done.stderr
    trained = (folder / "0/ppo/done.json").stat().st_mtime_ns
    assert not (folder / "1").exists()
    lit_rlhf(*sweep, "objective=ppo.kl")
    assert (folder / "0/ppo/done.json").stat().st_mtime_ns == trained and (folder / "1/ppo/done.json").is_file()
    job, summary = (json.loads((folder / "0" / name).read_text()) for name in ("job.json", "summary.json"))
    assert (job["objective"], job["value"]) == ("ppo.kl", summary["ppo"]["kl"])


def test_diverged_training_keeps_the_last_good_checkpoint(lit_rlhf, run_copy):
    settings = ["stage=sft", "run=hot", "from_run=quickstart", "sft.optimizer.lr=1e30"]
    done = lit_rlhf(*settings, "sft.trainer.max_epochs=20", check=False)
    assert done.returncode == 2
    assert "sft: at step" in done.stderr and "stopped before the weights changed" in done.stderr
    assert not (run_copy.parent / "hot" / "sft" / "model").exists()


def test_a_warning_of_ours_is_a_sentence():
    ours = one_line(UserWarning("no loss,\n for it cannot be"), UserWarning, one_line.__code__.co_filename, 82)
    assert ours == "no loss, for it cannot be\n"
    assert one_line("no", UserWarning, "/x/torch.py", 7) == "/x/torch.py:7: UserWarning: no\n"


def test_a_file_that_is_not_there_is_said_before_the_stages_before_it_run(lit_rlhf, tmp_path):
    done = lit_rlhf("sft/data=jsonl", "sft.data.path=./nowhere.jsonl", check=False)
    assert done.returncode == 2
    assert "nowhere.jsonl" in done.stderr
    assert not (tmp_path / "runs" / "quickstart" / "pretrain").exists()


def test_own_prompts_without_a_gold_judge_report_the_proxy(lit_rlhf, run_copy):
    prompts = run_copy.parents[1] / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"What is {i} plus {j}?"}) + "\n" for i in range(8) for j in range(8))
    )
    lit_rlhf(
        "stage=[ppo,evaluate]", "run=own", "from_run=quickstart", "ppo/data=jsonl", f"ppo.data.path={prompts}",
        "evaluate/data=jsonl", f"evaluate.data.path={prompts}",
    )  # fmt: skip
    summary = json.loads((run_copy.parent / "own" / "summary.json").read_text())
    assert summary["evaluate"]["judge"] == "reward model (proxy)"
    assert summary["evaluate"]["models"]["ppo"]["gold"] is None
    assert summary["ppo"]["gold"] is None


def test_module_can_be_run_from_anywhere(lit_rlhf, tmp_path):
    assert "lit-rlhf" in lit_rlhf("stage=nothing", check=False, cwd=tmp_path).stderr


def test_a_bad_line_of_a_later_stage_is_found_before_the_first_stage_begins(lit_rlhf, tmp_path):
    good = '{"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."}\n'
    (tmp_path / "pairs.jsonl").write_text(good * 2 + '{"prompt": "Hi", "chosen": "Hello!"}\n')
    settings = ["stage=[pretrain,sft,reward]", "reward/data=jsonl", "reward.data.path=pairs.jsonl"]
    done = lit_rlhf(*settings, check=False)
    assert done.returncode == 2 and "pairs.jsonl:3: no field 'rejected'" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "runs/quickstart/pretrain").exists()
