"""Models without weights have the shape of those with weights."""

import copy

import pytest

from lit_rlhf.models import (
    LoRA,
    RewardHead,
    load_policy,
    load_reward_model,
    reward_model_from_config,
    save_model,
)
from lit_rlhf.models.blank import architecture_of, blank_policy, blank_reward_model


def shapes(model):
    return {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}


def test_a_policy_from_its_config(model_config, policy, tokenizer):
    blank = blank_policy(model_config, tokenizer)
    assert shapes(blank) == shapes(policy)
    assert all(p.is_meta for p in blank.parameters())


@pytest.mark.parametrize("lora", [None, LoRA(r=2)])
def test_a_policy_from_a_folder_with_padding_added(policy, tokenizer, tmp_path, lora):
    save_model(policy, tokenizer, tmp_path / "model")
    larger = copy.deepcopy(tokenizer)
    larger.add_special_tokens({"pad_token": "<own-pad>"})
    loaded = load_policy(tmp_path / "model", larger, lora=lora)
    assert shapes(blank_policy(architecture_of(tmp_path / "model"), larger, lora)) == shapes(loaded)


@pytest.mark.parametrize(
    "head", [RewardHead(), RewardHead("mlp"), RewardHead("likelihood"), RewardHead(pooling="token")]
)
def test_a_reward_model_and_the_trunk_of_a_saved_one(model_config, tokenizer, tmp_path, head):
    model = reward_model_from_config(model_config, tokenizer, head)
    save_model(model, tokenizer, tmp_path / "model")
    assert shapes(blank_reward_model(model_config, tokenizer, head)) == shapes(model)
    loaded = load_reward_model(tmp_path / "model", tokenizer)
    assert shapes(blank_reward_model(architecture_of(tmp_path / "model"), tokenizer, head)) == shapes(loaded)
