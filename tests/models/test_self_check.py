"""What is asked of a model when it is loaded, and how often."""

import torch
from transformers import AutoModelForCausalLM

from lit_rlhf.models import (
    critic_from_policy,
    load_policy,
    load_reward_model,
    packed_hidden,
    policy_from_config,
    save_model,
)
from lit_rlhf.models.logits import check_logits
from lit_rlhf.models.policy import packs
from lit_rlhf.models.self_check import LENGTH, read
from lit_rlhf.rollouts import Sampling, generate
from lit_rlhf.text import pack

# A shape that no other test has: verdicts are kept for each config.
CONFIG = {
    "model_type": "llama", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 48, "initializer_range": 0.3, "tie_word_embeddings": True,
}  # fmt: skip


def passes(module):
    """Grows by one with each forward pass of ``module``."""
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_models_of_one_config_are_asked_once(tokenizer, tmp_path):
    save_model(policy_from_config(CONFIG, tokenizer), tokenizer, tmp_path / "model")
    policy = load_policy(tmp_path / "model", tokenizer)
    backbones = [
        load_policy(tmp_path / "model", tokenizer).base_model,
        load_reward_model(tmp_path / "model", tokenizer, new_head=True).base_model,
        critic_from_policy(policy).backbone,
    ]
    for backbone in backbones:
        calls = passes(backbone)
        assert packs(backbone) and not calls
        packed_hidden(backbone, pack([[5, 6, 7]], 0))
        assert len(calls) == 1


def test_the_plain_passes_serve_all_checks(tokenizer):
    torch.manual_seed(0)
    config = policy_from_config({**CONFIG, "num_hidden_layers": 2}, tokenizer).config
    config.intermediate_size = 44  # one that nobody has asked about, as of a checkpoint
    policy = AutoModelForCausalLM.from_config(config).eval()
    whole, backbone = passes(policy), passes(policy.base_model)
    check_logits(policy)
    assert (len(whole), len(backbone)) == (1, 2)  # the model's own pass, and its backbone's
    assert packs(policy.base_model)
    assert (len(whole), len(backbone)) == (1, 3)  # the packed one
    generate(policy, [[5, 6]], Sampling(2), eos_id=-1, pad_id=1)
    assert (len(whole), len(backbone)) == (1, 3)  # our own pass is none of the model's


def test_what_was_read_is_forgotten_when_weights_change(tokenizer):
    torch.manual_seed(0)
    policy = policy_from_config({**CONFIG, "num_hidden_layers": 1}, tokenizer).eval()
    with torch.no_grad():
        before = read(policy)
        assert read(policy) is before and before.shape == (2, LENGTH, len(tokenizer))
        policy.model.norm.weight.mul_(2)
        torch.testing.assert_close(read(policy), 2 * before)
        assert read(policy.double()).dtype == torch.float64
