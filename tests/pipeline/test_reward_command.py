"""Heads and ensembles, as a user types them."""

import json
import shutil

import pytest
from transformers import AutoModelForSequenceClassification

from lit_rlhf.errors import UserError
from lit_rlhf.models import load_reward_model
from lit_rlhf.pipeline.run_folder import register_resolvers, remember_world
from lit_rlhf.pipeline.settings import check_settings, compose_settings

register_resolvers()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reward.head.pooling=max", "reward.head.pooling=max: it should be 'last', 'mean', 'answer' or 'token'"),
        ("reward.head.kind=bilinear", "reward.head.kind=bilinear: it should be 'linear', 'mlp' or 'likelihood'"),
        ("reward.module.margin=-1", "reward.module.margin=-1: it should be greater than or equal to 0"),
        ("reward.module.label_smoothing=0.5", "reward.module.label_smoothing=0.5: it should be less than 0.5"),
        ("reward.module.feedback_loss=hinge", "feedback_loss=hinge: it should be 'logistic' or 'squared'"),
        ("ppo.reward_model.combine=best", "ppo.reward_model.combine=best: it should be 'mean' or 'worst'"),
    ],
)
def test_mistakes_are_one_line_that_names_the_setting(override, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        cfg = compose_settings([override])
        remember_world(cfg)
        check_settings(cfg)
    assert message in str(error.value)


@pytest.mark.slow
def test_a_linear_head_and_an_ensemble_go_through_the_pipeline(lit_rlhf, finished_run, tmp_path):
    shutil.copytree(finished_run / "runs", tmp_path / "runs")
    lit_rlhf("stage=[reward,ppo,evaluate]", "from_run=quickstart", "run=linear", "reward/head=linear")
    run = tmp_path / "runs" / "linear"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["reward"]["calibration"] and set(summary["reward"]["by"]) >= {"kind", "length", "gold_kind"}
    assert AutoModelForSequenceClassification.from_pretrained(run / "reward" / "model").config.num_labels == 1
    assert load_reward_model(tmp_path / "runs" / "quickstart" / "reward" / "model").score.spec.kind == "likelihood"
    page = (run / "report.html").read_text()
    assert "Where the reward model is right" in page and "by the gold judge" in page
    members = [f"runs/{name}/reward/model" for name in ("quickstart", "linear")]
    lit_rlhf(
        "stage=ppo", "from_run=quickstart", "run=ensemble", f"ppo.reward_model.path=[{','.join(members)}]",
        "ppo.reward_model.combine=worst",
    )  # fmt: skip
    inputs = json.loads((tmp_path / "runs" / "ensemble" / "ppo" / "done.json").read_text())["inputs"]
    assert sum("reward/model" in path for path in inputs) == 2  # both are remembered
    said = lit_rlhf(
        "stage=ppo", "from_run=quickstart", "run=gone", f"ppo.reward_model.path=[{members[0]},runs/x/y/z]", check=False,
    )  # fmt: skip
    assert said.returncode == 2 and "runs/x/y/z" in said.stderr and "Traceback" not in said.stderr
