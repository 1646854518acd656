"""Logits chunk by chunk: the same numbers as all at once, forward and backward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig, LlamaConfig, ModernBertDecoderConfig

from lit_rlhf.functional import full_kl, token_entropy, token_logprobs
from lit_rlhf.models import LoRA, add_lora, chunked, next_token_logits
from lit_rlhf.models.chunked import adds_to_gradients, by_row, by_token, token_logprobs_of
from lit_rlhf.models.kernels import onednn, use_fast_layers
from lit_rlhf.training.dry_run import Meter

TOKENS, WIDTH = 37, 8


def model_of(words: int, config: type = LlamaConfig, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "head_dim": 4, "vocab_size": words, "pad_token_id": 0}
    return AutoModelForCausalLM.from_config(config(**shape, **settings)).double()


def asked(model: nn.Module) -> tuple[Tensor, Tensor]:
    hidden = torch.randn(TOKENS, WIDTH, dtype=model.dtype, requires_grad=True)
    return hidden, torch.randint(model.config.vocab_size, (TOKENS,))


def gradients(model: nn.Module, hidden: Tensor, measured: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, measured.numel(), dtype=measured.dtype).view_as(measured)
    wanted = [hidden, *(p for p in model.get_output_embeddings().parameters() if p.requires_grad)]
    return list(torch.autograd.grad((measured * weights).sum(), wanted))


class Made(TorchDispatchMode):
    """Numbers in each of the tensors that are made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if is_dense(t)}
        made = [t for t in tree_leaves(out) if is_dense(t) and t.untyped_storage().data_ptr() not in given]
        self.sizes += [t.numel() for t in made]
        return out


def is_dense(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout == torch.strided


def logprobs_and_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    return torch.stack([token_logprobs(logits, tokens), token_entropy(logits)], dim=-1)


@pytest.mark.parametrize("words", [50_257, 262_144])
@pytest.mark.parametrize("tied", [True, False])
def test_equal_to_all_at_once_in_float64(words, tied):
    model = model_of(words, tie_word_embeddings=tied)
    hidden, tokens = asked(model)
    plain = logprobs_and_entropy(next_token_logits(model, hidden), tokens)
    chunked = by_token(model, logprobs_and_entropy, hidden, tokens, size=4 * words * 10)  # 10, 10, 10 and 7 tokens
    assert_close(chunked, plain, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(gradients(model, hidden, chunked), gradients(model, hidden, plain)):
        assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("earlier", [True, False])
def test_gradients_that_are_added_in_their_place_are_the_same_in_float64(tied, earlier, monkeypatch):
    monkeypatch.setattr(chunked, "LOGITS", 1)  # every embedding is a large one
    model = model_of(50, tie_word_embeddings=tied)
    read = torch.randint(50, (TOKENS,))
    found = []
    for adds in (nullcontext(), adds_to_gradients(model)):
        model.zero_grad()
        if earlier:
            model(input_ids=read[None, :5]).logits.square().sum().backward()
        places = {p: p.grad for p in model.parameters() if p.grad is not None}
        with adds:
            hidden = model.base_model(input_ids=read[None]).last_hidden_state[0]
            logprobs = by_token(model, token_logprobs, hidden, read, size=4 * 50 * 10)
        logprobs.square().sum().backward()
        assert all(p.grad is place for p, place in places.items())
        found.append([p.grad.clone() for p in model.parameters()])
    assert not model.get_input_embeddings().sparse
    for plain, added in zip(*found):
        assert_close(added, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tied", [True, False])
def test_a_second_backward_pass_makes_no_second_matrix_of_the_vocabularys_size(tied, monkeypatch):
    words = 4000
    monkeypatch.setattr(chunked, "LOGITS", 1)
    model = model_of(words, tie_word_embeddings=tied)
    read = torch.randint(words, (TOKENS,))

    def largest(adds: AbstractContextManager[None]) -> int:
        with Made() as seen:
            with adds:
                hidden = model.base_model(input_ids=read[None]).last_hidden_state[0]
                logprobs = by_token(model, token_logprobs, hidden, read, size=4 * words)
            logprobs.sum().backward()
        return max(seen.sizes)

    largest(adds_to_gradients(model))
    assert largest(adds_to_gradients(model)) <= words < largest(nullcontext()) == words * WIDTH


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (GraniteConfig, {"logits_scaling": 8.0}),
        (Gemma2Config, {"final_logit_softcapping": 0.5}),
        (ModernBertDecoderConfig, {"local_attention": 4}),  # its head has a matrix of its own, and a norm
    ],
)
def test_all_weights_between_states_and_logits_get_their_gradients(kind, settings):
    model = model_of(50, kind, **settings)
    hidden, tokens = asked(model)
    backbone = {id(p) for p in model.base_model.parameters()} - {id(model.get_output_embeddings().weight)}
    wanted = [hidden, *(p for p in model.parameters() if id(p) not in backbone)]
    found = []
    for size in (10**9, 4 * 50 * 10):
        logprobs = by_token(model, token_logprobs, hidden, tokens, size=size)
        found.append([logprobs, *torch.autograd.grad(logprobs.square().sum(), wanted)])
    for all_at_once, by_chunk in zip(*found):
        assert_close(by_chunk, all_at_once, rtol=1e-10, atol=1e-12)


def test_one_token_at_a_time_and_a_bias():
    head = nn.Linear(WIDTH, 11).double()
    hidden, tokens = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True), torch.arange(5)

    def capped(x: Tensor) -> Tensor:  # what comes before the head and after it belongs to the function
        return 3 * torch.tanh(head(x * 0.5) / 3)

    plain = token_logprobs(capped(hidden), tokens)
    chunked = by_row(capped, head, token_logprobs, hidden, tokens, size=1)
    assert_close(chunked, plain)
    wanted = [hidden, head.weight, head.bias]
    for ours, theirs in zip(
        torch.autograd.grad(chunked.square().sum(), wanted), torch.autograd.grad(plain.square().sum(), wanted)
    ):
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert head.weight.requires_grad and head.bias.requires_grad


def test_what_fits_is_computed_as_ever():
    model = model_of(64)
    hidden, tokens = asked(model)
    rows = hidden.view(1, TOKENS, WIDTH)
    plain = token_logprobs(next_token_logits(model, rows) / 0.7, tokens[None])
    assert torch.equal(token_logprobs_of(model, rows, tokens[None], 0.7), plain)


def test_a_divergence_over_the_whole_vocabulary():
    model, reference = model_of(300), model_of(300).requires_grad_(False)
    hidden, _ = asked(model)
    ref_hidden = torch.randn(TOKENS, WIDTH, dtype=torch.float64)

    def kl(logits: Tensor, ref_hidden: Tensor) -> Tensor:
        return full_kl(logits, next_token_logits(reference, ref_hidden))

    plain = kl(next_token_logits(model, hidden), ref_hidden)
    chunked = by_token(model, kl, hidden, ref_hidden, size=4 * 300 * 9)
    assert_close(chunked, plain)
    for ours, theirs in zip(gradients(model, hidden, chunked), gradients(model, hidden, plain)):
        assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_frozen_head_gets_no_gradient():
    model = model_of(300).requires_grad_(False)
    hidden, tokens = asked(model)
    chunked = by_token(model, token_logprobs, hidden, tokens, size=4 * 300 * 9)
    [ours] = gradients(model, hidden, chunked)
    [theirs] = gradients(model, hidden, token_logprobs(next_token_logits(model, hidden), tokens))
    assert_close(ours, theirs)


def test_a_head_with_adapters():
    model = model_of(300)
    add_lora(model, LoRA(r=2))
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False), model)
    hidden, tokens = asked(model)
    chunked = by_token(model, token_logprobs, hidden, tokens, size=4 * 300 * 9)
    plain = token_logprobs(next_token_logits(model, hidden), tokens)
    found, expected = gradients(model, hidden, chunked), gradients(model, hidden, plain)
    assert len(found) == 3  # two matrices of the adapter
    for ours, theirs in zip(found, expected):
        assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mixed", [True, False])
def test_mixed_precision_and_onednn_are_those_of_the_forward_pass(mixed, monkeypatch):
    model = model_of(3000).float()
    monkeypatch.setattr(chunked, "PIECE", 700 * WIDTH)  # five pieces
    monkeypatch.setattr(onednn, "WIDTH", 8)
    monkeypatch.setattr(onednn, "by_intel", lambda: False)
    use_fast_layers(model, on_cpu=True)
    assert isinstance(model.get_output_embeddings(), onednn.OneDNNLinear)
    hidden, tokens = asked(model)
    results = []
    for size in (4 * 3000 * 9, 2**30):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            measured = by_token(model, token_logprobs, hidden, tokens, size=size)
        results.append([measured, *gradients(model, hidden, measured)])  # outside, as Lightning's automatic backward
    for ours, theirs in zip(*results):
        assert ours.dtype == theirs.dtype == torch.float32
        assert_close(ours, theirs, **({"rtol": 2e-2, "atol": 2e-2} if mixed else {"rtol": 1e-4, "atol": 1e-6}))


@pytest.mark.parametrize("bias", [True, False])
def test_a_head_in_pieces_is_the_whole_head_in_float64(monkeypatch, bias):
    monkeypatch.setattr(chunked, "PIECE", 3 * WIDTH)  # 3, 3, 3 and 2 words
    head = nn.Linear(WIDTH, 11, bias=bias).double()
    hidden = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    found, expected = chunked._product(head, torch.float64, hidden), head(hidden)
    assert_close(found, expected, rtol=1e-12, atol=1e-12)
    slope = torch.randn_like(expected)
    [ours], [theirs] = (torch.autograd.grad(x, [hidden], slope) for x in (found, expected))
    assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_in_mixed_precision_the_head_is_cast_and_its_gradient_made_in_pieces(monkeypatch):
    words = 4000
    monkeypatch.setattr(chunked, "LOGITS", 4 * words)
    monkeypatch.setattr(chunked, "PIECE", words * WIDTH // 5)
    model = model_of(words).float()
    head, own = model.get_output_embeddings(), model.get_output_embeddings().weight
    hidden, tokens = asked(model)

    def made() -> int:
        with Made() as seen:
            with torch.autocast("cpu", torch.bfloat16), adds_to_gradients(model):
                logprobs = by_token(model, token_logprobs, hidden, tokens, size=4 * words * 5)  # eight chunks
            logprobs.sum().backward()
        assert head.weight is own and own.requires_grad and "forward" not in vars(head)
        return seen.sizes.count(own.numel())

    made()
    assert made() == 0


def test_not_all_logits_are_there_at_once():
    words, tokens = 50_000, 4096  # 0.8 GB of float32 logits
    with torch.device("meta"):
        model = model_of(words).float()
    hidden = torch.randn(tokens, WIDTH, device="meta", requires_grad=True)
    with Meter(model) as meter:
        token_logprobs_of(model, hidden, torch.zeros(tokens, dtype=torch.int64)).sum().backward()
    assert 2**26 < meter.peak < 6 * 2**26
