"""The recipe that fits: chosen by itself, overridden by experiments and the command line; what constructors carry."""

import inspect
import sys
from dataclasses import asdict, is_dataclass
from functools import cache, partial

import pytest
import yaml
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from lit_rlhf.errors import UserError
from lit_rlhf.pipeline.command import check_jobs, fit_options
from lit_rlhf.pipeline.recipe import fitted_settings, recipe_line
from lit_rlhf.pipeline.run_folder import register_resolvers, remember_world
from lit_rlhf.pipeline.settings import check_settings, compose_settings, conf_dir
from lit_rlhf.stages.stage import all_stages

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
    assert rates(scratch) == dict(zip(TRAINED, (1.2e-2, 1.5e-3, 1.5e-3, 7e-4, 3e-4, 3e-4)))
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
    own = {} if name == "instructions" else {"reward": 1e-4}
    assert start.path == "weights" and rates(cfg) == {**rates(fitted(*MODEL)), **own} and cfg.model.config is None
    fresh = fitted(f"experiment={name}")
    assert "path" not in (fresh.sft.policy if fresh.stage == "sft" else fresh.reward.reward_model)


def test_a_likelihood_head_has_its_own_rate_where_it_is_made_from_scratch():
    fresh, given = fitted().reward, fitted("reward/head=likelihood", *MODEL).reward
    assert fresh.head.kind == given.head.kind == "likelihood" and fitted(*MODEL).reward.head.kind == "linear"
    assert (fresh.optimizer.lr, fresh.trainer.max_epochs, fresh.data.batch_size) == (7e-4, 1, 8)
    assert fresh.module.lm_coef == 0
    linear = fitted("reward/head=linear").reward
    assert (linear.head.kind, linear.optimizer.lr, linear.trainer.max_epochs) == ("linear", 1.5e-3, 3)
    assert given.optimizer.lr == fitted(*MODEL).reward.optimizer.lr and given.module.lm_coef == 0


def test_adapters_have_rates_of_their_own():
    full, adapters = (fitted(*MODEL, *more) for more in ((), ("sft.lora.r=8", "dpo.lora.r=8")))
    for stage, times in (("sft", 10), ("dpo", 30)):
        assert adapters[stage].optimizer.lr == pytest.approx(times * full[stage].optimizer.lr)
    assert adapters.reward.optimizer.lr == full.reward.optimizer.lr
    goes_on = fitted(*MODEL, "sft.lora.path=adapter")
    assert goes_on.sft.optimizer.lr == adapters.sft.optimizer.lr
    critic = fitted(*MODEL, "ppo.critic.lora.r=8").ppo
    assert critic.module.critic_lr == 3e-4 and critic.optimizer.lr == full.ppo.optimizer.lr
    sentiment = "experiment=sentiment", "ppo.data.path=prompts.json", *MODEL, "stage=ppo"
    assert fitted(*sentiment).ppo.optimizer.lr == 1e-3
    assert fitted(*sentiment, "ppo.lora.r=0").ppo.optimizer.lr == full.ppo.optimizer.lr


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
    origin = {"recipe": "scratch", "checkpoint": str(tmp_path / "a-checkpoint")}
    (stage / "config.yaml").write_text(yaml.safe_dump({"sft": {}, "origin": origin}))
    cfg = fitted_settings(["stage=dpo", "from_run=began", "run=next"])
    assert recipe_line(cfg) == "recipe: scratch (as runs/began has it, though it began with a checkpoint)"


def test_sweeps_and_hydras_own_options_get_it_too(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lit-rlhf", *MODEL, "--cfg", "job"])
    fit_options(sys.argv[1:])
    assert sys.argv == ["lit-rlhf", "recipe=checkpoint", *MODEL, "--cfg", "job"]
    fit_options(["--help", *MODEL]), fit_options(["--cfg", "job"])
    assert len(sys.argv) == 6
    with pytest.raises(UserError, match=r"some jobs of this sweep start from a checkpoint .* and others do not"):
        check_jobs(["stage=sft", "model.path=null,weights"], None)
    check_jobs(["stage=sft", "model.path=null,weights", "recipe=checkpoint"], None)
    assert "recipe=checkpoint" not in sys.argv[5:]
    check_jobs(["stage=sft", "model.path=weights,others"], None)
    assert sys.argv[-1] == "recipe=checkpoint"  # for all jobs alike


# Where a constructor leaves open what the command decides on; trainers, too, have budgets and the machine's settings.
EXCEPTIONS = {
    "data.cache", "module.progress_file", "health.path",  # places of files: a notebook has no run
    "module.ptx",  # the text itself
    "reward_model.new_head",  # whether a reward model is made or taken
}  # fmt: skip
PARTS = ("module", "data", "policy", "reward_model", "annotator", "health")


def plain(value):
    return [plain(x) for x in value] if isinstance(value, list | tuple) else value


def taken(made):
    """(class or function, what it takes by default) of it, of a partial of it, or of a dataclass's object."""
    if is_dataclass(made) and not isinstance(made, type):
        return type(made), asdict(made)
    function, given = (made.func, made.keywords) if isinstance(made, partial) else (made, {})
    parameters = inspect.signature(function).parameters.values()
    return function, {p.name: p.default for p in parameters if p.default is not p.empty} | given


def differences(node, default, address):
    """Addresses below the object ``node`` at which the settings are other than ``default``; None: its class's own."""
    made = get_object(node["_target_"])
    function, settled = taken(made if default is None else default)
    if function is not made:
        yield f"{address}: {made} for {function}"
    elif is_dataclass(default) and not isinstance(default, type):
        asked = taken(instantiate(node, _convert_="all"))[1]
        yield from (f"{address}.{k}: {asked[k]} for {v}" for k, v in settled.items() if plain(asked[k]) != plain(v))
    else:
        for name in node.keys() & settled.keys():
            value, place = node[name], f"{address}.{name}"
            if any(place.endswith(exception) for exception in EXCEPTIONS):
                continue
            if isinstance(value, dict) and "_target_" in value:
                yield from differences(value, settled[name], place)
            elif plain(value) != plain(settled[name]):
                yield f"{place}: {value} for {settled[name]}"


@cache
def given_a_checkpoint(files):
    """The settings of all stages, whose data come from files or from the world."""
    kinds = {stage: "world" if not files else "text" if stage == "pretrain" else "jsonl" for stage in all_stages()}
    there = {stage: (conf_dir() / stage / "data" / f"{kind}.yaml").is_file() for stage, kind in kinds.items()}
    data = [f"{stage}/data={kind}" for stage, kind in kinds.items() if there[stage]]  # some read files alone
    paths = [f"{stage}.data.path=a.jsonl" for stage in all_stages() if files or not there[stage]]
    cfg = compose_settings([*MODEL, "recipe=checkpoint", *data, *paths, "seed=0", "split.seed=0", "world.seed=0"])
    return {stage: OmegaConf.to_container(cfg[stage], resolve=True) for stage in all_stages()}


@pytest.mark.parametrize("files", [True, False])
@pytest.mark.parametrize("stage", all_stages())
def test_constructors_and_the_checkpoints_recipe_have_one_set_of_defaults(stage, files):
    """In a notebook nothing is composed: what is left out there must be what the command takes for a checkpoint."""
    settings = given_a_checkpoint(files)[stage]
    parts = {name: settings[name] for name in PARTS if "_target_" in (settings.get(name) or {})}
    assert {"module", "data"} <= parts.keys()
    assert [line for name, node in parts.items() for line in differences(node, None, f"{stage}.{name}")] == []


def addresses(node, prefix=""):
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for name, child in node.items() for k, v in addresses(child, f"{prefix}.{name}").items()}


def test_the_recipe_of_fresh_models_changes_what_its_file_says_and_nothing_else():
    recipe = OmegaConf.load(conf_dir() / "recipe" / "scratch.yaml")
    assert recipe.pop("defaults") == [{"override /reward/head": "likelihood"}]
    head = OmegaConf.load(conf_dir() / "recipe" / "reward_head" / "scratch_likelihood.yaml")
    said = addresses(
        OmegaConf.to_container(OmegaConf.merge(recipe, {"reward": head}, {"reward": {"head": {"kind": ""}}}))
    )
    both = (compose_settings([f"recipe={recipe}"]) for recipe in ("scratch", "checkpoint"))
    made, given = (addresses(OmegaConf.to_container(cfg)) for cfg in both)
    assert made.keys() == given.keys() and {k for k in made if made[k] != given[k]} <= said.keys() <= made.keys()


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
