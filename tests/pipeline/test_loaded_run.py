"""A run's folder in a notebook."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

import lit_rlhf as package
from lit_rlhf.errors import UserError
from lit_rlhf.models import score_answers


def test_a_run_gives_models_figures_and_tables(finished_run):
    folder = finished_run / "runs/quickstart"
    run = package.load(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert run.summary == summary and run.figures("ppo") == summary["ppo"]
    assert run.stages == ["pretrain", "sft", "preference", "reward", "ppo", "evaluate"]
    metrics = run.metrics("ppo")
    assert metrics.index.name == "step" and metrics.index.is_monotonic_increasing and metrics["ppo/kl"].notna().any()
    assert {"step", "prompt", "text"} <= {*run.samples("sft").columns}
    rankings = run.rankings()
    lines = (folder / "data/rankings-0.jsonl").read_text().splitlines()
    assert len(rankings) == len(lines) and rankings["ranks"][0] == json.loads(lines[0])["ranks"]


def test_the_package_alone_imports_no_layer():
    code = "import lit_rlhf, sys; print([name for name in sys.modules if name.startswith('lit_rlhf.')])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_models_are_those_of_the_stages(finished_run):
    run = package.load(str(finished_run / "runs/quickstart"))
    policy, tokenizer = run.policy()
    sft, _ = run.policy("sft")
    assert not torch.equal(policy.get_input_embeddings().weight, sft.get_input_embeddings().weight)
    question = [{"role": "user", "content": "What colour is the rof?"}]
    scores = score_answers(run.reward_model(), tokenizer, [question], ["The rof is red."])
    assert scores.shape == (1,) and scores.isfinite().all()


def test_a_notebook_shows_figures_and_the_report(finished_run):
    run = package.load(finished_run / "runs/quickstart")
    shown, wins = run._repr_html_(), run.summary["evaluate"]["win_rate"]["ppo_vs_sft"]["mean"]
    assert "<table>" in shown and f"{wins:.1%}" in shown and "quickstart" in repr(run)
    assert f"prompts {run.figures('evaluate')['prompts']}" in shown  # no stage's row is empty
    assert "<iframe" in run.show(300).data and "height: 300px" in run.show(300).data


def test_rankings_that_were_deleted_are_named(finished_run, tmp_path, capsys):
    shutil.copytree(finished_run / "runs/quickstart", tmp_path / "copy")
    (tmp_path / "copy/data/rankings-0.jsonl").unlink()
    assert package.load(tmp_path / "copy").rankings().empty
    assert "data/rankings-0.jsonl: gone since the stage ended" in capsys.readouterr().out


def test_what_is_not_there_is_named(finished_run, tmp_path):
    with pytest.raises(UserError, match="no such folder, where a run was expected"):
        package.load(tmp_path / "none")
    with pytest.raises(UserError, match="no stage of a run is in this folder"):
        package.load(tmp_path)
    run = package.load(finished_run / "runs/quickstart")
    with pytest.raises(UserError, match="dpo has none of this here; one of ppo, sft, pretrain was expected"):
        run.policy("dpo")
    with pytest.raises(UserError, match="dpo has none of this here; one of pretrain, sft"):
        run.figures("dpo")
    runs = finished_run / "runs"
    with pytest.raises(UserError, match=f"it is a stage of the run {runs}/quickstart, which was expected"):
        package.load(runs / "quickstart/ppo")
    with pytest.raises(UserError, match=f"it holds runs: {runs}/quickstart; name one"):
        package.load(runs)
