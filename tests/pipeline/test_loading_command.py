"""Whatever stage or command loads a broken model refuses it, by name and in one line."""

import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from lit_rlhf.apps.chat.assistant import load_assistant
from lit_rlhf.errors import UserError, users_mistake
from lit_rlhf.models import load_reward_model, policy_from_config, save_model
from lit_rlhf.pipeline.plan import write_plan
from lit_rlhf.pipeline.run import check_models, load_models
from lit_rlhf.pipeline.run_folder import check_inputs, register_resolvers, remember_world
from lit_rlhf.pipeline.settings import check_settings, compose_settings, name_loaders, opened, resolved
from lit_rlhf.text import Transcript, ensure_chat_template, load_tokenizer, train_bpe

register_resolvers()
CONFIG = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Folders of a policy and of a reward model that are whole, and of the two with NaN in a matrix."""
    monkeypatch.chdir(tmp_path)
    tokenizer = train_bpe(["What is 12 + 30? It is 42.", "Who are you? I am the cat."] * 3, 300)
    ensure_chat_template(tokenizer)
    for name in ("policy", "bad_policy"):
        save_model(policy_from_config(CONFIG, tokenizer), tokenizer, tmp_path / name)
    for name in ("reward", "bad_reward"):
        save_model(load_reward_model(tmp_path / "policy", tokenizer, new_head=True), tokenizer, tmp_path / name)
    for name in ("bad_policy", "bad_reward"):
        weights = load_file(tmp_path / name / "model.safetensors")
        weights["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
        save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


CONSUMERS = {  # {0}: the folder of these models
    "pretrain": "stage=pretrain pretrain/init=checkpoint model=hf model.path={0}/bad_policy",
    "sft": "stage=sft model=hf model.path={0}/bad_policy",
    "sft by its path": "stage=sft sft.policy.path={0}/bad_policy",
    "classify": "stage=classify model=hf model.path={0}/bad_policy",
    "few_shot": "stage=few_shot model=hf model.path={0}/bad_policy",
    "preference": "stage=preference preference.policy.path={0}/bad_policy",
    "another of preference": "stage=preference preference.policy.path={0}/policy "
    "preference.models={{x:{0}/bad_policy}}",
    "annotator": "stage=preference preference.policy.path={0}/policy preference/annotator=reward_model "
    "preference.annotator.path={0}/bad_reward",
    "reward": "stage=reward reward.reward_model.path={0}/bad_policy",
    "reward with a head": "stage=reward reward/head=mlp reward.reward_model.path={0}/bad_policy",
    "ppo": "stage=ppo ppo.policy.path={0}/bad_policy ppo.reward_model.path={0}/reward",
    "reward model of ppo": "stage=ppo ppo.policy.path={0}/policy ppo.reward_model.path={0}/bad_reward",
    "ensemble of ppo": "stage=ppo ppo.policy.path={0}/policy ppo.reward_model.path=[{0}/reward,{0}/bad_reward]",
    "dpo": "stage=dpo dpo.policy.path={0}/bad_policy",
    "evaluate": "stage=evaluate evaluate.reward_model.path={0}/reward evaluate.policies.sft.path={0}/policy "
    "evaluate.policies.mine={0}/bad_policy",
    "reward model of evaluate": "stage=evaluate evaluate.reward_model.path={0}/bad_reward",
}


def settings_of(arguments):
    cfg = compose_settings(opened(arguments.split()))
    name_loaders(cfg)
    remember_world(cfg)
    check_settings(cfg)
    return cfg.stage, OmegaConf.create(resolved(cfg, cfg.stage))


UP = "model.layers.0.mlp.up_proj.weight"
FAULTS = {  # of the tensors, and what is said of each
    "nan": (lambda w: w, "up_proj.weight holds 1 of 256"),
    "infinite": (lambda w: w[UP].fill_(torch.inf), "up_proj.weight holds 256 of 256"),
    "missing": (lambda w: w.pop(UP), f"1 missing ({UP})"),
    "unexpected": (lambda w: w.update({UP: torch.ones(16, 16), "odd": torch.ones(2)}), "1 unexpected (odd)"),
    "shape": (lambda w: w.update({UP: torch.ones(3, 16)}), f"{UP} is [3, 16] for [16, 16]"),
}


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_every_stage_refuses_a_broken_model(models, consumer):
    stage, settings = settings_of(CONSUMERS[consumer].format(models))
    for change, expected in FAULTS.values():
        for name in ("bad_policy", "bad_reward"):
            weights = load_file(models / name / "model.safetensors")
            change(weights)
            save_file(weights, models / name / "model.safetensors", metadata={"format": "pt"})
        check_models(stage, settings)
        with pytest.raises(Exception) as error:
            load_models(stage, settings, load_tokenizer(models / "policy"))
        said = users_mistake(error.value)
        assert said is not None and "\n" not in str(said)
        assert str(said).startswith(f"{models / 'bad_'}") and expected in str(said)


@pytest.mark.parametrize("consumer", [c for c in CONSUMERS if c != "reward"])  # which goes on from either
def test_every_stage_refuses_a_model_of_another_kind(models, consumer):
    for name, other in (("bad_policy", "reward"), ("bad_reward", "policy")):
        shutil.rmtree(models / name)
        shutil.copytree(models / other, models / name)
    stage, settings = settings_of(CONSUMERS[consumer].format(models))
    with pytest.raises(Exception) as error:
        load_models(stage, settings, load_tokenizer(models / "policy"))
    said = str(users_mistake(error.value))
    assert said.startswith(f"{models / 'bad_'}") and " was expected" in said and "\n" not in said


def test_model_hf_without_a_path_asks_for_it_where_nothing_else_is_named(lit_rlhf, models, tmp_path):
    (tmp_path / "sft.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": "d"}\n')
    data = ["sft/data=jsonl", "sft.data.path=sft.jsonl"]
    done = lit_rlhf("stage=sft", "model=hf", *data, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "lit-rlhf: model.path is not given; give it as model.path=..."
    lit_rlhf("stage=sft", "model=hf", f"sft.policy.path={models}/policy", *data)


ELSEWHERE = [c for c in CONSUMERS.values() if "model=hf" not in c]


@pytest.mark.parametrize("stage", [*ELSEWHERE, "stage=few_shot few_shot.policy.path={0}/policy"])
def test_model_hf_asks_for_no_path_that_nobody_uses(models, stage):
    assert settings_of("model=hf " + stage.format(models))


def test_evaluation_of_a_model_from_elsewhere_needs_no_base(models, capsys):
    arguments = ["stage=evaluate", "model=hf", f"evaluate.reward_model.path={models}/reward"]
    given = compose_settings([*arguments, f"evaluate.policies.sft.path={models}/policy"])
    check_inputs(given)
    assert not (models / resolved(given, "evaluate")["policies"]["base"]["path"]).exists()
    with pytest.raises(UserError, match=r"evaluate: .*sft/model is not there. Run stage=sft first .* or set evaluate"):
        check_inputs(compose_settings(arguments))
    chat = resolved(compose_settings(["stage=chat", "model=hf", f"chat.model={models}/policy"]), "chat")
    assert chat["models"]["base"].endswith("pretrain/model")
    with pytest.raises(UserError, match=r"^model\.path is not given"):
        write_plan(compose_settings(["stage=plan", "model=hf"]))


def test_an_adapter_is_looked_at_by_its_base(models):
    (models / "adapter").mkdir()
    base = models / "policy"
    (models / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    _, settings = settings_of(f"stage=sft sft.policy.path={models}/adapter")
    check_models("sft", settings)
    (base / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"{base}: no weights there"):
        check_models("sft", settings)


def test_chat_refuses_a_broken_model(models):
    with pytest.raises(UserError, match=r"up_proj\.weight holds 1 of 256 numbers that are NaN"):
        load_assistant("it", models / "bad_policy", Transcript())


def test_a_folder_that_lacks_its_weights_is_said_in_one_line(lit_rlhf, models):
    weights = models / "bad_policy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    for arguments in ("stage=sft model=hf model.path={}", "stage=chat chat.model={}"):
        done = lit_rlhf(*arguments.format(models / "bad_policy").split(), check=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"lit-rlhf: {weights}: cut off or damaged")
