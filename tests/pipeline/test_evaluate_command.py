"""Evaluation as a user asks for it."""

import json
import shutil

import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.pipeline.run_folder import check_inputs, register_resolvers, remember_world
from lit_rlhf.pipeline.settings import check_settings, compose_settings, name_loaders, opened, resolved

register_resolvers()


def settings(*arguments):
    cfg = compose_settings(opened(list(arguments)))
    name_loaders(cfg)
    remember_world(cfg)
    check_settings(cfg)
    return cfg


def test_a_model_is_added_by_its_path():
    cfg = settings("stage=evaluate", "evaluate.policies.mine=some/folder", "evaluate.policies.base=null")
    policies = resolved(cfg, "evaluate")["policies"]
    loader = {"_target_": "lit_rlhf.models.load_policy_and_tokenizer"}
    assert policies["mine"] == {**loader, "path": "some/folder"}
    assert policies["base"] is None and list(policies)[-1] == "mine"


def test_the_opponent_is_changed_by_its_path_and_brings_its_tokenizer():
    cfg = settings("stage=evaluate", "evaluate.policies.sft=some/folder")
    assert resolved(cfg, "evaluate")["tokenizer"]["path"] == "some/folder"


def test_deeper_addresses_stay_strict():
    assert opened(["evaluate.policies.ppo.pth=x", "evaluate.module.samples=2"])[0] == "evaluate.policies.ppo.pth=x"
    with pytest.raises(UserError, match=r"evaluate\.policies\.ppo\.pth: there is no such setting"):
        settings("evaluate.policies.ppo.pth=x")


def test_a_model_that_is_named_has_to_be_there(tmp_path):
    sft = tmp_path / "a" / "sft" / "model"
    sft.mkdir(parents=True)
    (tmp_path / "a" / "reward" / "model").mkdir(parents=True)
    cfg = settings("stage=evaluate", f"paths.runs={tmp_path}", "run=a", "evaluate.policies.mine=/no/such/model")
    with pytest.raises(UserError, match=r"evaluate\.policies\.mine\.path=/no/such/model: there is no such file"):
        check_inputs(cfg)
    check_inputs(settings("stage=evaluate", f"paths.runs={tmp_path}", "run=a"))  # PPO was not run: it is left out


def test_own_models_compete_and_trained_prompts_are_refused(lit_rlhf, finished_run, tmp_path):
    shutil.copytree(finished_run / "runs", tmp_path / "runs")
    again = ["stage=evaluate", "run=again", "from_run=quickstart"]
    said = lit_rlhf(*again, "evaluate.policies.mine=runs/quickstart/ppo/model", "evaluate/annotator=world").stdout
    assert "does not say" not in said
    figures = json.loads((tmp_path / "runs/again/evaluate/done.json").read_text())["figures"]
    assert figures["judge"] == "SimulatedLabeler"
    assert {"base", "prompted", "sft", "ppo", "mine", "best_of_n"} == set(figures["ratings"]["models"])
    assert {"mine_vs_ppo", "mine_vs_sft"} <= set(figures["win_rate"])

    rankings = (tmp_path / "runs/quickstart/data/rankings-0.jsonl").read_text().splitlines()
    rows = [json.loads(row) for row in rankings]
    trained = [{"prompt": row["prompt"]} for row in rows if row["split"] == "train"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trained))
    own = ["evaluate/data=jsonl", "evaluate.data.path=p.jsonl", "evaluate.data.held_out=0.5"]
    refused = lit_rlhf(*again, "overwrite=true", *own, check=False)
    assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1
    assert (
        "all 24 prompts were trained on by earlier stages" in refused.stderr and "quickstart/reward" in refused.stderr
    )
    assert "allow_trained=true" in refused.stderr
