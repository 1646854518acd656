"""PPO's choices, as a user types them."""

import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.pipeline.run import _policies
from lit_rlhf.pipeline.run_folder import register_resolvers, remember_world
from lit_rlhf.pipeline.settings import check_settings, compose_settings

register_resolvers()
REWARDS = """
def brief(prompts, responses, kind, finished, **record):
    return [-len(response) / 10 for response in responses]

def failing(prompts, responses, **record):
    raise LookupError("no such row")
"""
FROM = ("stage=ppo", "from_run=quickstart")


@pytest.fixture
def after_reward(finished_run, tmp_path):
    """A folder with a finished run to start from, and reward functions."""
    shutil.copytree(finished_run / "runs", tmp_path / "runs")
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    return tmp_path


def refuse(monkeypatch, folder, *overrides):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError) as error:
        cfg = compose_settings(list(overrides))
        remember_world(cfg)
        check_settings(cfg)
    return str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("ppo.loss.clip_range=0", "ppo.loss.clip_range=0: it should be greater than 0"),
        ("ppo.loss.clip_range=-0.1", "ppo.loss.clip_range=-0.1: it should be greater than 0"),
        ("ppo/loss=kl_penalty ppo.loss.beta=-1", "ppo.loss.beta=-1: it should be greater than or equal to 0"),
        ("ppo.advantage.lam=1.5", "ppo.advantage.lam=1.5: it should be less than or equal to 1"),
        ("ppo/advantage=rloo ppo.advantage.baseline=median", "ppo.advantage.baseline=median: it should be 'none'"),
        ("ppo/advantage=rloo ppo.advantage.lam=1", "ppo.advantage.lam: there is no such setting"),
        ("ppo.kl.estimator=k4", "ppo.kl.estimator=k4: it should be 'k1', 'k2', 'k3' or 'full'"),
        ("ppo.kl.target=0", "ppo.kl.target=0: it should be greater than 0"),
        ("ppo.kl.stop=0", "ppo.kl.stop=0: it should be greater than 0"),
        ("ppo.reference.ema=1", "ppo.reference.ema=1: it should be less than 1"),
        ("ppo.reference.refresh_every=0", "ppo.reference.refresh_every=0: it should be greater than or equal to 1"),
        ("ppo.module.action=word", "ppo.module.action=word: it should be 'token' or 'answer'"),
        ("ppo.seed=x", "ppo.seed=x: it should be a valid integer"),
        ("ppo.module.answers_per_prompt=0", "answers_per_prompt=0: it should be greater than or equal to 1"),
        ("ppo.module.value_clip_range=0", "ppo.module.value_clip_range=0: it should be greater than 0"),
        ("ppo.scoring.scale=batch", "ppo.scoring.scale=batch: it should be 'reference', 'running' or 'none'"),
        ("ppo.scoring.missing_eos_penalty=-1", "missing_eos_penalty=-1: it should be greater than or equal to 0"),
        ("ppo.lora.r=-1", "ppo.lora.r=-1: it should be greater than or equal to 0"),
        (
            "ppo.lora.targets=[q_proj]",
            "ppo.lora.targets: there is no such setting. Did you mean",
        ),
        ("ppo.reward_model=null ppo.reward_model.path=a", "has replaced ppo.reward_model"),
        ("ppo.lora.alpha=8", "ppo.lora.alpha: there is no such setting. Did you mean ppo.lora.lora_alpha"),
        ("ppo.lora.lora_dropout=0.1", "Did you mean lora.lora_dropout"),  # as in older versions
        ("+ppo.lora.bias=some", "ppo.lora.bias=some: it should be 'none', 'lora_only' or 'all'"),
        ("lora.init_lora_weights=pissa", "lora.init_lora_weights=pissa: it should be a valid boolean"),
        ("ppo.module.ptx_coef=-1", "ppo.module.ptx_coef=-1: it should be greater than or equal to 0"),
        ("ppo.module.ptx_ratio=0", "ppo.module.ptx_ratio=0: it should be greater than 0"),
        ("ppo/critic=none", "Could not find 'ppo/critic/none'"),
    ],
)
def test_values_that_cannot_be_are_refused_before_anything_is_loaded(overrides, message, tmp_path, monkeypatch):
    said = refuse(monkeypatch, tmp_path, *overrides.split())
    assert message in said and "\n" not in said.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("ppo/advantage=rloo ppo.module.answers_per_prompt=1", "answers_per_prompt=1 (ppo.module): this"),
        ("ppo.kl.in_loss=true", "estimator='k1' with in_loss=True (ppo.kl)"),
        ("ppo.reward_model=null ppo.scoring.functions=[my_rewards.brief]", "(ppo/critic=reward_model) needs a reward"),
        (
            "ppo.lora.r=2 ppo.lora.target_modules=[nothing]",
            "nothing matches nothing in this model, whose matrices are down_proj",
        ),
        ("ppo.scoring.functions=[my_rewards.failing]", "reward function failing raised LookupError: no such row, on"),
    ],
)
def test_what_cannot_be_ends_in_one_line(overrides, message, lit_rlhf, after_reward):
    done = lit_rlhf(*FROM, "run=refused", *overrides.split(), check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("lit-rlhf: ")


@pytest.mark.slow
def test_functions_of_the_users_take_the_reward_models_place(lit_rlhf, after_reward):
    function = "ppo.scoring.functions=my_rewards.brief"
    lit_rlhf(*FROM, "run=own", "ppo.reward_model.path=null", function, "ppo/advantage=grpo", "ppo/loss=kl_penalty")
    figures = json.loads((after_reward / "runs" / "own" / "summary.json").read_text())["ppo"]
    assert figures["score_first"] < 0


@pytest.mark.slow
def test_adapters_text_and_a_running_scale(lit_rlhf, after_reward):
    lit_rlhf(*FROM, "run=lora", "ppo.lora.r=2", "ppo.module.ptx_coef=0.1", "ppo.scoring.scale=running",
             "ppo.kl.adaptive=true", "ppo.kl.target=1", "ppo/critic=shared")  # fmt: skip
    runs = after_reward / "runs"
    figures = json.loads((runs / "lora" / "summary.json").read_text())["ppo"]
    assert figures["ptx_loss"] > 0
    folders = [runs / "quickstart" / "sft" / "model", runs / "lora" / "ppo" / "model"]
    start, model = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    assert start.state_dict().keys() == model.state_dict().keys()
    changed = {name for name, weight in model.state_dict().items() if (weight != start.state_dict()[name]).any()}
    assert changed and all("_proj." in name for name in changed)
    tokens = torch.tensor([AutoTokenizer.from_pretrained(folders[1])("What?")["input_ids"]])
    assert model(tokens).logits.shape[-1] == start.config.vocab_size


def test_a_tuned_checkpoint_is_improved_by_a_reward_function(lit_rlhf, finished_run, tmp_path):
    """Nothing is fine-tuned in such a run: the checkpoint stands in the place of the SFT model."""
    checkpoint = finished_run / "runs/quickstart/sft/model"
    rows = [
        {"prompt": f"What colour is the {name}?"} for name in ("rof", "mul", "tek", "sib", "lon", "gar", "pim", "dov")
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = lit_rlhf(
        "experiment=sentiment", "model=hf", f"model.path={checkpoint}", "ppo.data.path=prompts.jsonl",
        "ppo.data.held_out=0.3", "ppo.data.batch_size=4", "ppo.module.minibatch_size=8",
    )  # fmt: skip
    assert f"ppo: starts from the checkpoint {checkpoint}" in done.stdout
    summary = json.loads((tmp_path / "runs/sentiment/summary.json").read_text())
    assert -1 <= summary["ppo"]["val_score"] <= 1


def test_a_checkpoint_that_is_base_and_sft_in_one_is_evaluated_once(finished_run, capsys):
    path = str(finished_run / "runs/quickstart/sft/model")
    policies = {**{name: {"path": path} for name in ("base", "sft", "mine")}, "ppo": None}
    settings = OmegaConf.create({"policies": policies})
    assert list(_policies(settings)) == ["sft", "mine"]
    assert f"evaluate: base and sft are one model, {path}; it is called sft" in capsys.readouterr().out
