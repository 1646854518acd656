"""The recipe that fits: chosen by itself, overridden by experiments and the command line; what constructors carry."""

import inspect
import sys
from functools import cache, partial

import pytest
import yaml
from hydra.utils import get_object
from omegaconf import OmegaConf

from lit_rlhf.errors import UserError
from lit_rlhf.pipeline.command import check_jobs, fit_options
from lit_rlhf.pipeline.folder import register_resolvers, remember_world
from lit_rlhf.pipeline.recipe import fitted_settings, recipe_line
from lit_rlhf.pipeline.settings import check_settings, compose_settings

register_resolvers()
MODEL = ("model=hf", "model.path=weights")
TRAINED = ("pretrain", "sft", "classify", "reward", "ppo", "dpo")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@cache
def fitted(*overrides):
    """Of settings that no file of a run decides on."""
    return fitted_settings(list(overrides))


def rates(cfg):
    return {stage: cfg[stage].optimizer.lr for stage in TRAINED}


@pytest.mark.parametrize("model", [MODEL, ("model=gpt2",), ("stage=ppo", "ppo.policy.path=weights")])
def test_where_weights_are_given_the_checkpoints_recipe_is_taken(model):
    cfg, scratch = fitted(*model), fitted()
    assert (cfg.recipe, scratch.recipe) == ("checkpoint", "scratch")
    assert rates(scratch) == dict(zip(TRAINED, (4e-3, 1.5e-3, 1.5e-3, 1.5e-3, 3e-4, 3e-4)))
    assert max(rates(cfg).values()) <= 1e-4
    assert "gives weights" in recipe_line(cfg) and "made from scratch" in recipe_line(scratch)


def test_experiments_stand_on_the_recipe_and_the_command_line_on_both():
    study = ["experiment=label_studio"]
    given, fresh = fitted(*study, *MODEL), fitted(*study)
    assert given.sft.optimizer.lr == fitted(*MODEL).sft.optimizer.lr < 1e-4
    assert (fresh.sft.optimizer.lr, fresh.sft.trainer.max_epochs) == (4e-3, 10)
    assert given.reward.data.batch_size == fresh.reward.data.batch_size == 4  # the study's own, in both
    assert given.ppo.module.kl_coef == 0.05 and given.sft.policy.path == "weights"
    assert fitted(*study, *MODEL, "sft.optimizer.lr=0.5").sft.optimizer.lr == 0.5
    asked = fitted(*MODEL, "recipe=scratch")
    assert rates(asked) == rates(fitted()) and "as asked, though" in recipe_line(asked)
    assert "as asked" in recipe_line(fitted("recipe=checkpoint"))


@pytest.mark.parametrize("name", ["instructions", "instruction_preferences", "hh_rlhf"])
def test_a_study_of_a_fresh_model_starts_from_the_checkpoint_where_one_is_given(name):
    cfg = fitted(f"experiment={name}", *MODEL)
    start = cfg.sft.policy if cfg.stage == "sft" else cfg.reward.reward_model
    assert start.path == "weights" and rates(cfg) == rates(fitted(*MODEL)) and cfg.model.config is None
    fresh = fitted(f"experiment={name}")
    assert "path" not in (fresh.sft.policy if fresh.stage == "sft" else fresh.reward.reward_model)


def test_a_likelihood_head_has_its_own_rate_where_it_is_made_from_scratch():
    fresh, given = (fitted("reward/head=likelihood", *more).reward for more in ((), MODEL))
    assert (fresh.optimizer.lr, fresh.trainer.max_epochs, fresh.data.batch_size) == (7e-4, 1, 8)
    assert fresh.module.lm_coef == 0
    assert given.optimizer.lr == fitted(*MODEL).reward.optimizer.lr and given.module.lm_coef == 0


def test_adapters_have_ten_times_the_rate():
    full, adapters = (fitted(*MODEL, *more) for more in ((), ("sft.lora.r=8", "dpo.lora.r=8")))
    for stage in ("sft", "dpo"):
        assert adapters[stage].optimizer.lr == pytest.approx(10 * full[stage].optimizer.lr)
    assert adapters.reward.optimizer.lr == full.reward.optimizer.lr
    critic = fitted(*MODEL, "ppo.critic.lora.r=8").ppo
    assert critic.module.critic_lr == 3e-4 and critic.optimizer.lr == full.ppo.optimizer.lr


def test_a_run_that_began_from_a_checkpoint_is_remembered(tmp_path):
    stage = tmp_path / "runs" / "began" / "sft"
    (stage / "model").mkdir(parents=True)
    (stage / "config.yaml").write_text(yaml.safe_dump({"sft": {}, "origin": {"recipe": "checkpoint"}}))
    cfg = fitted_settings(["stage=ppo", "from_run=began", "run=next"])
    assert cfg.recipe == "checkpoint" and "came from a checkpoint" in recipe_line(cfg)
    assert fitted_settings(["stage=ppo", "from_run=began", "run=next", "recipe=scratch"]).recipe == "scratch"
    assert fitted_settings(["stage=pretrain", "from_run=began", "run=next"]).recipe == "scratch"  # it makes its own
    experiment = ["experiment=instruction_preferences", "reward.data.path=pairs.json", "from_run=began"]
    assert fitted_settings(experiment).reward.reward_model.path == "runs/began/sft/model"
    assert fitted_settings([*experiment, "recipe=scratch"]).reward.reward_model.config
    (stage / "config.yaml").write_text(yaml.safe_dump({"sft": {}, "origin": {"recipe": "scratch"}}))
    assert fitted_settings(["stage=ppo", "from_run=began", "run=next"]).recipe == "scratch"


def test_sweeps_and_hydras_own_options_get_it_too(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lit-rlhf", *MODEL, "--cfg", "job"])
    fit_options(sys.argv[1:])
    assert sys.argv == ["lit-rlhf", "recipe=checkpoint", *MODEL, "--cfg", "job"]
    fit_options(["--help", *MODEL]), fit_options(["--cfg", "job"])
    assert len(sys.argv) == 6
    with pytest.raises(UserError, match=r"some jobs of this sweep start from a checkpoint .* and others do not"):
        check_jobs(["stage=sft", "model.path=null,weights"], None)
    check_jobs(["stage=sft", "model.path=null,weights", "recipe=checkpoint"], None)


EXCEPTIONS = {  # not of the recipe: who samples, where things lie, and what a command seeds by itself
    "seed", "split_seed", "cache", "path", "engine", "scoring", "kl", "reference", "ptx", "advantage", "loss", "critic",
    "tokenizer", "val_samples", "sample_prompt",
}  # fmt: skip


def defaults(target):
    return {n: p.default for n, p in inspect.signature(target).parameters.items() if p.default is not p.empty}


@pytest.mark.parametrize("stage", TRAINED)
def test_constructors_carry_the_checkpoints_settings(stage):
    """In a notebook nothing is composed: what is left out there must be what the command takes for a checkpoint."""
    data = "text" if stage == "pretrain" else "jsonl"
    cfg = fitted_settings([*MODEL, f"{stage}/data={data}", f"{stage}.data.path=a.jsonl", "seed=0", "split.seed=0"])
    node = OmegaConf.to_container(cfg[stage], resolve=True)
    module = defaults(get_object(node["module"]["_target_"]))
    for settings, taken in ((node["module"], module), (node["data"], defaults(get_object(node["data"]["_target_"])))):
        for name in taken.keys() & settings.keys() - EXCEPTIONS - {"optimizer", "schedule", "sampling"}:
            assert settings[name] == taken[name], (stage, name)
    for part in ("optimizer", "schedule"):
        made = module[part]
        settled = {**defaults(made.func), **made.keywords} if isinstance(made, partial) else defaults(made)
        asked = {k: tuple(v) if isinstance(v, list) else v for k, v in node[part].items() if k in settled}
        assert asked == {k: settled[k] for k in asked}, (stage, part)
    if stage in ("sft", "dpo", "ppo"):
        sampling = node["module"]["sampling"]
        assert sampling["max_new_tokens"] == defaults(get_object(sampling["_target_"]))["max_new_tokens"]


@pytest.mark.parametrize("model", [(), MODEL])
def test_both_recipes_pass_the_check_in_every_stage(model):
    cfg = fitted_settings(["stage=[sft,classify,preference,reward,ppo,dpo,evaluate]", *model])
    remember_world(cfg)
    check_settings(cfg)


def test_what_the_recipe_must_set_is_set():
    for recipe in ("scratch", "checkpoint"):
        cfg = compose_settings([f"recipe={recipe}"])
        for stage in TRAINED:
            OmegaConf.to_container(cfg[stage], resolve=True, throw_on_missing=True)
