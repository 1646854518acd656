"""What the benchmarks work on."""

from functools import partial

import pretrain
import pytest
import rollout
import sft
import torch
from torch.testing import assert_close
from workload import (
    NEVER,
    VOCABULARY,
    Lengths,
    LlamaShape,
    Shape,
    chance,
    chat_tokenizer,
    end_chance,
    make_models,
    prompts,
)

from lit_rlhf.models import load_policy, load_reward_model
from lit_rlhf.training import adamw

TINY = Shape(layers=2, width=64, heads=2)
TINY_LLAMA = LlamaShape(layers=2, width=64, heads=4, kv_heads=2, inner=96, vocabulary=VOCABULARY + 60)


def test_useful_flops_by_hand():
    # a layer of width 2: 24 * 4 = 96 a token; 3 tokens see 1 + 2 + 3 = 6, at 4 * 2 each; a logit row 2 * 2 * V
    assert Shape(1, 2, 1).forward_flops(3) == 3 * 96 + 6 * 8
    assert Shape(5, 2, 1).forward_flops(3, logits=2) == 5 * (3 * 96 + 6 * 8) + 2 * 4 * VOCABULARY


@pytest.mark.parametrize("wanted", [1 / 33, NEVER])
def test_answers_end_as_often_as_they_should(tmp_path, wanted):
    policy, _ = make_models(TINY, tmp_path, wanted)
    tokenizer = chat_tokenizer()
    tokens = torch.randint(VOCABULARY - 5, (16, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ending = load_policy(policy, tokenizer)(tokens).logits.softmax(-1)[..., tokenizer.eos_token_id].mean()
    assert_close(ending, torch.tensor(wanted), rtol=0.2, atol=1e-6)


def test_lengths_are_those_of_a_policy_that_ends_early():
    lengths = Lengths(0, 64)
    drawn = [lengths.answer() for _ in range(20000)]
    p = end_chance(64)
    assert min(drawn) == 1 and max(drawn) == 64
    assert sum(drawn) / len(drawn) == pytest.approx((1 - (1 - p) ** 64) / p, rel=0.02)
    assert abs(sum(drawn[:500]) / sum(drawn[500:1000]) - 1) < chance(500)


def test_reward_model_reads_the_policys_backbone(tmp_path):
    policy, reward_model = make_models(TINY, tmp_path)
    tokenizer = chat_tokenizer()
    backbones = load_policy(policy, tokenizer).base_model, load_reward_model(reward_model, tokenizer).base_model
    assert_close(backbones[0].h[0].mlp.c_fc.weight, backbones[1].h[0].mlp.c_fc.weight)
    assert len(tokenizer) == VOCABULARY
    assert all(8 <= len(p) <= 32 for p in prompts(50))


def test_the_bare_model_is_the_same_function(tmp_path):
    path, _ = make_models(TINY, tmp_path, activation="gelu_pytorch_tanh")
    bare = pretrain.BareGPT.from_checkpoint(path, TINY, 512)
    tokens = torch.randint(VOCABULARY, (2, 9))
    with torch.no_grad():
        expected = load_policy(path)(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), tokens[:, 1:].flatten())
        assert_close(bare(tokens[:, :-1], tokens[:, 1:]), loss)


def test_a_rollout_is_compared(monkeypatch):
    monkeypatch.setitem(rollout.SHAPES, "S", TINY)
    found, checks = rollout.measure(rollout.Case("S", early=False, laps=1, batch=4, new_tokens=3), threads=1, laps=1)
    assert [lap.amount for side in found.values() for lap in side] == [12, 12]
    assert all(check.passed for check in checks)


def test_pretraining_is_compared_loss_by_loss(monkeypatch):
    monkeypatch.setitem(pretrain.SHAPES, "S", TINY)
    found, checks = pretrain.measure(pretrain.Case("S", laps=2, batch=2, length=8), threads=1, laps=2)
    ours, theirs = ([lap.watched["loss"] for lap in side] for side in found.values())
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert all(check.passed for check in checks)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rollout_of_a_llama_is_compared(monkeypatch, dtype):
    monkeypatch.setitem(rollout.SHAPES, "135M", TINY_LLAMA)
    case = rollout.Case("135M", early=False, laps=1, batch=16, new_tokens=8, dtype=dtype)
    found, checks = rollout.measure(case, threads=1, laps=1)
    assert [lap.amount for side in found.values() for lap in side] == [128, 128]
    assert all(check.passed for check in checks)


@pytest.mark.parametrize("precision", [sft.FLOAT32, sft.BF16])
def test_fine_tuning_is_compared_with_a_padded_loop(monkeypatch, precision):
    monkeypatch.setitem(sft.SHAPES, "135M", TINY_LLAMA)
    case = sft.Case("135M", packed=False, batch=4, laps=3, peer=sft.LOOP, warmup=1, precision=precision)

    def losses():
        found, checks = sft.measure(case, threads=1, laps=3)
        assert all(check.passed for check in checks)
        return ([lap.watched["loss"] for lap in side] for side in found.values())

    ours, theirs = losses()
    assert ours == pytest.approx(theirs, rel=1e-5 if precision == sft.FLOAT32 else 0.01)
    # The steps are there: without them the same batches have other losses. Their texts are random, and need not fall.
    monkeypatch.setattr(sft, "OPTIMIZER", partial(adamw, lr=0.0))
    monkeypatch.setattr(sft, "LR", 0.0)
    untrained, _ = losses()
    moved = [abs(a / b - 1) for a, b in zip(ours, untrained)]
    assert min(moved) > 1e-4
