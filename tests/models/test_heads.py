import json

import pytest
import torch
from torch import nn, tensor
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.models import (
    critic_from_policy,
    critic_from_reward_model,
    critic_on_policy,
    load_reward_model,
    packed_hidden,
    reward_model_from_config,
    save_model,
)
from lit_rlhf.models.heads import packed_scores
from lit_rlhf.models.reward_head import score_scale
from lit_rlhf.text import pack

TEXTS = ["What is 42?", "I am the cat", "12", "You are  30, 👍🏽 and the cat! Who?", "It"]


@pytest.fixture
def reward_model(model_config, tokenizer):
    torch.manual_seed(0)
    model = reward_model_from_config(model_config, tokenizer).eval()
    assert not model.score.weight.any()  # a fresh head scores everything 0
    nn.init.normal_(model.score.weight)
    return model


def ended(tokenizer):
    return [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS]


def packed(tokenizer):
    return pack(ended(tokenizer), tokenizer.pad_token_id)


def every(batch):
    """The index of each token."""
    return torch.arange(len(batch.tokens))


def test_scores_are_read_at_the_last_token(reward_model, tokenizer):
    scores = packed_scores(reward_model, packed(tokenizer))
    for sequence, score in zip(ended(tokenizer), scores):
        alone = reward_model.base_model(input_ids=tensor([sequence])).last_hidden_state[0, -1]
        assert_close(score, alone @ reward_model.score.weight[0])


def test_a_critic_that_begins_as_the_reward_model_values_every_token_as_it_does(policy, reward_model, tokenizer):
    batch, critic = packed(tokenizer), critic_from_reward_model(policy, reward_model)
    values = critic(batch, every(batch), None)
    assert values.shape == (batch.tokens.numel(),)
    assert_close(values[batch.ends], packed_scores(reward_model, batch))
    for start, sequence in zip(batch.starts.tolist(), ended(tokenizer)):
        alone = reward_model.base_model(input_ids=tensor([sequence])).last_hidden_state[0]
        assert_close(values[start : start + len(sequence)], alone @ reward_model.score.weight[0])
    critic.head.weight.data.zero_()  # it is a copy
    assert reward_model.score.weight.any()


def test_a_frozen_reward_model_makes_a_critic_that_learns(policy, reward_model):
    critic = critic_from_reward_model(policy, reward_model.requires_grad_(False))
    assert all(p.requires_grad for p in critic.parameters())


def test_a_critic_that_begins_as_the_policy_values_everything_0(policy, tokenizer):
    batch, critic = packed(tokenizer), critic_from_policy(policy)
    assert not critic(batch, every(batch), None).any()
    assert torch.equal(packed_hidden(critic.backbone, batch), packed_hidden(policy, batch))
    assert not {id(p) for p in critic.parameters()} & {id(p) for p in policy.parameters()}


def test_a_critic_on_the_policy_is_a_head_alone(policy, tokenizer):
    batch, critic = packed(tokenizer), critic_on_policy(policy)
    assert [p.shape for p in critic.parameters()] == [(1, 32)]
    hidden = packed_hidden(policy, batch)
    assert not critic(batch, every(batch), hidden).any()
    nn.init.normal_(critic.head.weight)
    assert_close(critic(batch, every(batch), hidden), hidden @ critic.head.weight[0])


def test_a_critic_from_a_reward_model_that_is_not_there_is_refused(policy):
    with pytest.raises(UserError, match=r"critic=critic_from_reward_model .*needs a reward model, and there is none"):
        critic_from_reward_model(policy, None)


def test_the_head_is_linear_without_bias(reward_model):
    assert isinstance(reward_model.score, nn.Linear)
    assert reward_model.score.weight.shape == (1, 32) and reward_model.score.bias is None
    assert reward_model.config.num_labels == 1


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_saved_folder_gives_the_same_scores_in_plain_transformers(reward_model, tokenizer, tmp_path, side):
    reward_model.config.score_shift, reward_model.config.score_std = -1.25, 0.5
    expected = packed_scores(reward_model, packed(tokenizer))
    save_model(reward_model, tokenizer, tmp_path / "model")

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    plain_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model", padding_side=side)
    batch = plain_tokenizer([text + plain_tokenizer.eos_token for text in TEXTS], padding=True, return_tensors="pt")
    if side == "left":  # transformers counts GPT-2's positions from the padding on
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        assert_close(plain(**batch).logits[:, 0], expected, rtol=0, atol=1e-5)
        one = plain_tokenizer(TEXTS[3] + plain_tokenizer.eos_token, return_tensors="pt")
        assert_close(plain(**one).logits[:, 0], expected[3:4], rtol=0, atol=1e-5)
    assert plain.config.score_shift == -1.25
    assert json.loads((tmp_path / "model" / "config.json").read_text())["score_shift"] == -1.25


def test_shift_and_deviation_come_back(reward_model, tokenizer, tmp_path):
    assert score_scale(reward_model)[::2] == (0.0, 1.0)  # a model that does not say
    reward_model.config.score_shift, reward_model.config.score_std = -1.25, 0.5
    save_model(reward_model, tokenizer, tmp_path / "model")
    loaded = load_reward_model(tmp_path / "model", tokenizer)
    assert score_scale(loaded)[::2] == (-1.25, 0.5)
    assert_close(packed_scores(loaded, packed(tokenizer)), packed_scores(reward_model, packed(tokenizer)))


def test_a_language_model_becomes_a_reward_model_with_its_backbone(policy, tokenizer, tmp_path):
    policy.save_pretrained(tmp_path)
    loaded = load_reward_model(tmp_path, tokenizer, new_head=True)
    batch = packed(tokenizer)
    assert torch.equal(packed_hidden(loaded, batch), packed_hidden(policy, batch))
    assert loaded.config.num_labels == 1 and loaded.score.weight.shape == (1, 32)
    assert loaded.config.pad_token_id == tokenizer.pad_token_id


def test_the_embedding_of_a_reward_model_grows_too(policy, tokenizer, tmp_path):
    policy.save_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "<own-pad>"})
    assert load_reward_model(tmp_path, tokenizer, new_head=True).get_input_embeddings().num_embeddings == len(tokenizer)


def test_no_reward_model_there(tmp_path):
    with pytest.raises(UserError, match="no model there"):
        load_reward_model(tmp_path / "missing")


def test_a_language_model_is_not_taken_for_a_reward_model(policy, tokenizer, tmp_path):
    save_model(policy, tokenizer, tmp_path / "model")
    with pytest.raises(UserError, match="a language model, where a reward model was expected"):
        load_reward_model(tmp_path / "model", tokenizer)
    assert not load_reward_model(tmp_path / "model", tokenizer, new_head=True).score.weight.any()
