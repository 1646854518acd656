"""Logits from hidden states are those that the model itself gives, whatever stands between them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lit_rlhf.models import next_token_logits, packed_hidden, policy_from_config
from lit_rlhf.models.chunked import token_logprobs_of
from lit_rlhf.rollouts import FastEngine, Sampling, sample
from lit_rlhf.stages import SFTModule
from lit_rlhf.stages.evaluate.text import text_nats
from lit_rlhf.text.packing import pack

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
# What each does between the last hidden states and the logits.
FAMILIES = {
    "llama": SHAPE,
    "granite": {**SHAPE, "logits_scaling": 8.0, "embedding_multiplier": 3.0},  # divides them
    "gemma2": {**SHAPE, "final_logit_softcapping": 5.0, "head_dim": 8, "num_key_value_heads": 2},  # bends them
    "cohere": {**SHAPE, "logit_scale": 0.25},  # multiplies them
    "phi": SHAPE,  # adds a bias
    "opt": {**SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": SHAPE,
}  # fmt: skip
FAMILIES["opt"].pop("intermediate_size")
PLAIN = ("llama", "opt", "gpt_neox")  # a linear layer without a bias, and nothing else
TEXTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15], [16, 17, 18, 19, 20]]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family, tokenizer):
    torch.manual_seed(0)
    config = {"model_type": family, **FAMILIES[family]}
    model = policy_from_config(config, tokenizer).eval().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def own_logprobs(model, tokens):
    """Log-probs (T - 1,) of the tokens of a text behind its first, by a plain forward pass."""
    ids = torch.tensor([tokens])
    return model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)


def test_they_are_the_models_own(model, family):
    ids = torch.tensor([TEXTS[0]])
    hidden, expected = model.base_model(input_ids=ids).last_hidden_state, model(input_ids=ids).logits
    assert_close(next_token_logits(model, hidden), expected, rtol=0, atol=1e-12)
    assert_close(next_token_logits(model, hidden[0]), expected[0], rtol=0, atol=1e-12)
    # The comparison can fail: the head alone gives something else, where there is more than a head.
    alone = (hidden @ model.get_output_embeddings().weight.T - expected).abs().max()
    assert (alone < 1e-9) == (family in PLAIN)


def test_nothing_is_left_behind(model):
    before = dict(vars(model)), dict(model._modules)
    next_token_logits(model, torch.zeros(3, model.config.hidden_size, dtype=torch.float64))
    assert (dict(vars(model)), dict(model._modules)) == before
    assert model.base_model is model._modules[model.base_model_prefix]


def test_gradients_reach_weights_and_states(model):
    ids, found = torch.tensor([TEXTS[0]]), []
    for logits in (lambda: next_token_logits(model, model.base_model(input_ids=ids).last_hidden_state),
                   lambda: model(input_ids=ids).logits):  # fmt: skip
        model.zero_grad()
        logits().square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in found[1].items():
        assert_close(found[0][name], grad, rtol=1e-9, atol=1e-9, msg=name)


def test_rows_are_added_to_whole_logits(model, monkeypatch):
    hidden = torch.randn(5, model.config.hidden_size, dtype=torch.float64)
    expected, seen = next_token_logits(model, hidden), []
    monkeypatch.setattr("lit_rlhf.models.logits.rows_to_add", lambda backbone, count: seen.append(count) or 27)
    assert_close(next_token_logits(model, hidden), expected, rtol=0, atol=1e-12)
    assert seen == [5]


def test_losses_are_those_of_the_model(model, tokenizer):
    """SFT, and held-out text; of a tiny Granite the loss was 15.26 where the model's own is 10.81."""
    packed = pack(TEXTS, tokenizer.pad_token_id)
    learned = torch.cat([packed.starts[:, None] + torch.arange(1, 4)[None]]).flatten()
    batch = SimpleNamespace(packed=packed, learned=learned, normalizer=len(learned))
    expected = -torch.stack([own_logprobs(model, text)[:3] for text in TEXTS]).mean()
    assert_close(SFTModule(model, tokenizer).eval().losses(batch)[0], expected, rtol=0, atol=1e-7)

    end = tokenizer.eos_token_id
    ids = [end, *tokenizer("You are the cat!")["input_ids"], end]
    found = text_nats(model, tokenizer, ["You are the cat!"], 64)
    assert_close(found[0].sum(), -own_logprobs(model, ids).sum(), rtol=0, atol=1e-6)
    assert found[1].sum() == len(ids) - 1


def test_the_logprobs_of_what_was_sampled(model, tokenizer):
    """By sampling, by PPO's pass over packed answers, and by the model itself."""
    model = model.float()
    responses = sample(FastEngine(), model, tokenizer, TEXTS, Sampling(max_new_tokens=6), range(len(TEXTS)))
    written = [prompt + tokens for prompt, tokens in zip(TEXTS, responses.token_lists())]
    packed = pack(written, tokenizer.pad_token_id, responses.lengths.tolist())
    for i, (text, n) in enumerate(zip(written, responses.lengths.tolist())):
        expected = own_logprobs(model, text)[-n:]
        assert_close(responses.logprobs[i, :n], expected, rtol=0, atol=1e-4, check_dtype=False)
        before = packed.ends[i] - n + torch.arange(n)
        found = token_logprobs_of(model, packed_hidden(model, packed, at=before), torch.tensor(text[-n:]))
        assert_close(found, expected, rtol=0, atol=1e-4, check_dtype=False)
