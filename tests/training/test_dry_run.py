"""What a computation needs, against what it takes when it really runs."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from lit_rlhf.functional import token_logprobs
from lit_rlhf.models import next_token_logits, packed_hidden, policy_from_config
from lit_rlhf.models.micro_batches import tokens_at_once
from lit_rlhf.models.policy import layers
from lit_rlhf.text.packing import pack
from lit_rlhf.training.batches import largest
from lit_rlhf.training.dry_run import Meter
from lit_rlhf.training.memory import bytes_of
from lit_rlhf.training.parts import Part

FLOAT = 4  # bytes


@pytest.fixture
def linear():
    with torch.device("meta"):
        return nn.Linear(16, 32, bias=False)


def test_bytes_of_a_product_by_hand(linear):
    with Meter(linear) as meter:
        meter.live += 5
        assert meter.live == 5 + 16 * 32 * FLOAT
        x = torch.empty(8, 16, device="meta")
        y = linear(x)
        assert meter.live == 5 + (16 * 32 + 8 * 16 + 8 * 32) * FLOAT
        y.sum().backward()
        del x, y
        assert meter.live == 5 + 2 * 16 * 32 * FLOAT  # weight and gradient
    assert meter.peak >= (2 * 16 * 32 + 8 * 16 + 8 * 32) * FLOAT


def test_views_are_no_memory(linear):
    with Meter(linear) as meter:
        x = torch.empty(8, 16, device="meta")
        before = meter.live
        kept = [x.view(4, 32), x.t(), x[2:], x.expand(3, 8, 16), linear.weight.t()]
        assert meter.live == before and len(kept) == 5


def test_integers_and_masks_are_real(linear):
    with Meter(linear):
        places = torch.arange(3, device="meta") + torch.tensor([1, 2, 3], device="meta")
        assert places.to(torch.device("meta")).tolist() == [1, 3, 5]
        assert torch.zeros(2, dtype=torch.bool, device="meta").any().item() is False
        values = torch.empty(2, 3, device="meta")
        assert values.argmax(-1).tolist() == [0, 0] and not (values > 1).any()  # computed from values: 0
        assert float(values.sum()) == 0.0 and values.tolist() == [[0.0] * 3] * 2


def test_real_masks_say_how_many(linear):
    mask = torch.tensor([[True, False, True], [False, True, False]])
    with Meter(linear):
        values = torch.empty(3, device="meta", requires_grad=True)
        scattered = torch.zeros(2, 3, device="meta").masked_scatter(mask, values)
        assert scattered[mask].shape == (3,)
        assert torch.masked_select(scattered, mask).shape == (3,)
        scattered.sum().backward()
        assert values.grad.shape == (3,)
        assert int(mask.sum()) == 3  # what is real, stays real


def test_half_precision_halves_what_products_keep(linear):
    with Meter(linear, "bf16-mixed") as meter:
        x = torch.empty(8, 16, device="meta", requires_grad=True)
        before = meter.live
        y = linear(x)
        assert y.dtype == torch.bfloat16
        # The halved weight and input stay for the backward pass, beside the output.
        assert meter.live - before == (16 * 32 + 8 * 16 + 8 * 32) * 2


@pytest.mark.parametrize("product", [torch.baddbmm, torch.addmm])
def test_what_is_added_to_a_product_is_cast_with_it(linear, product):
    shapes = [(2, 3, 4), (2, 3, 5), (2, 5, 4)]
    with Meter(linear, "bf16-mixed"):
        tensors = [torch.empty(s if product is torch.baddbmm else s[1:], device="meta") for s in shapes]
        assert product(tensors[0], tensors[1].bfloat16(), tensors[2]).dtype == torch.bfloat16


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("cuda", torch.bfloat16)])
def test_in_half_precision_a_cpu_attends_in_float32(linear, device, dtype):
    kept = []
    with Meter(linear, "bf16-mixed", device):
        q, k, v = (torch.empty(1, 2, 5, 8, device="meta", requires_grad=True) for _ in "qkv")
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert {t.dtype for t in kept if t.shape == q.shape} == {dtype}


def saved_by(loss_of, model):
    """Bytes that autograd really keeps for the backward pass, without the model's own."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        loss = loss_of(model)
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept.values() if t.is_floating_point()
    }
    return sum(size for place, size in storages.items() if place not in own) + loss.nbytes


@pytest.mark.parametrize("threads", [1, 2])  # attention by PyTorch's kernel, and by batched products
def test_a_models_activations_are_those_that_autograd_keeps(model_config, policy, tokenizer, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    batch = pack([[5] * n for n in (20, 31, 7, 44, 12, 40)], 0)
    learned = torch.arange(1, 40)

    def loss_of(model):
        hidden = packed_hidden(model, batch)[learned - 1]
        return -token_logprobs(next_token_logits(model, hidden), batch.tokens[learned]).sum()

    with torch.device("meta"):
        blank = policy_from_config(model_config, tokenizer).train()
    with Meter(blank) as meter:
        meter.learn(blank, lambda: loss_of(blank), in_parts=False)
    assert meter.activations == pytest.approx(saved_by(loss_of, policy.train()), rel=0.03)
    alone = meter.peak
    with Meter(blank) as meter:
        meter.learn(blank, lambda: loss_of(blank), in_parts=True)
    assert alone < meter.peak <= alone + bytes_of(blank.parameters())  # gradients of other parts are there


def test_what_is_known_of_an_operation_is_what_is_said_of_it_first(linear):
    def step():
        x = torch.empty(8, 16, device="meta")
        y = linear(x[:, :]).softmax(-1).bfloat16()
        (y.view(-1, 2).float() * 2)[:3].add_(1).sum().backward()
        made = [(y.shape, y.stride(), y.dtype), (linear.weight.grad.shape, linear.weight.grad.dtype)]
        linear.weight.grad = None
        return made

    peaks = []
    with Meter(linear) as meter:
        before = meter.live
        for _ in range(2):
            said = step()
            peaks.append((meter.peak - before, meter.live - before, said))
            meter.peak = meter.live
    assert peaks[0] == peaks[1] and peaks[0][1] == 0 and meter._calls


@pytest.mark.parametrize(("precision", "half"), [("32-true", 1), ("bf16-mixed", 2)])
def test_of_a_sharded_model_a_process_keeps_its_part_and_gathers_layers(model_config, tokenizer, precision, half):
    with torch.device("meta"):
        blank = policy_from_config(model_config, tokenizer).train()
    weights, layer = bytes_of(blank.parameters()), bytes_of(layers(blank.base_model)[0].parameters())
    rest = weights - len(layers(blank.base_model)) * layer
    buffers = bytes_of(blank.buffers())
    batch = pack([[5] * n for n in (20, 31, 7)], 0)

    def loss_of():
        return packed_hidden(blank, batch).float().sum()

    given = [tokens_at_once(blank, learning=learning) for learning in (True, False)]
    with Meter(blank, precision, shards=4) as meter:
        assert [tokens_at_once(blank, learning=learning) for learning in (True, False)] == given
        held = (weights + buffers) // 4
        assert meter.live == held + (3 * layer + rest) // half
        loss = loss_of()
        loss.backward()
        del loss
        # Without the head, of which no logits were asked.
        learned = sum(p.numel() for p in blank.parameters() if p.grad is not None)
        assert meter.live == pytest.approx(held + (3 * layer + rest) // half + learned * FLOAT // 4, abs=8)
        assert meter.gathered == 2 * weights // half  # forward and backward
        with torch.no_grad():
            loss_of()
        assert meter.gathered == 3 * weights // half


def test_the_largest_batch_of_all_loaders():
    class Batch(NamedTuple):
        tokens: torch.Tensor
        texts: list[str]

        @classmethod
        def of(cls, *shape):
            return cls(torch.zeros(shape), ["a text"] * shape[0])

    small, large = Batch.of(2, 3), Batch.of(4, 3)
    parts = [Part(small, 0.5), Part(large, 0.5)]  # of one batch
    assert largest([[small, large], [small]]) is large
    assert largest([[large, parts]]) is parts
