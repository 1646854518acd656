"""What a computation needs, against what it takes when it really runs."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from lit_rlhf.functional import token_logprobs
from lit_rlhf.models import next_token_logits, packed_hidden
from lit_rlhf.models.blank import blank_policy
from lit_rlhf.models.kernels.onednn import OneDNNLinear
from lit_rlhf.text.packing import pack
from lit_rlhf.training import adamw
from lit_rlhf.training.trace import Heap, Rates, Trace, bytes_of, measure_rates, optimizer_bytes

FLOAT = 4  # bytes


@pytest.fixture
def linear():
    with torch.device("meta"):
        return nn.Linear(16, 32, bias=False)


def test_bytes_and_flops_of_a_product_by_hand(linear):
    with Trace(linear) as trace:
        assert trace.live == 16 * 32 * FLOAT
        x = torch.empty(8, 16, device="meta")
        y = linear(x)
        assert trace.live == (16 * 32 + 8 * 16 + 8 * 32) * FLOAT
        assert trace.flops == 2 * 8 * 16 * 32
        y.sum().backward()  # of the weight alone: x asks for no gradient
        assert trace.flops == 4 * 8 * 16 * 32
        del x, y
        assert trace.live == 2 * 16 * 32 * FLOAT  # weight and gradient
    assert trace.peak >= (2 * 16 * 32 + 8 * 16 + 8 * 32) * FLOAT


def test_views_are_no_memory(linear):
    with Trace(linear) as trace:
        x = torch.empty(8, 16, device="meta")
        before = trace.live
        kept = [x.view(4, 32), x.t(), x[2:], x.expand(3, 8, 16), linear.weight.t()]
        assert trace.live == before and len(kept) == 5


def test_seconds_are_the_rooflines(linear):
    x = torch.empty(8, 16, device="meta")
    products = Rates(flops=1e3, bytes=1e30, call=0.0)
    copies = Rates(flops=1e30, bytes=1e3, call=0.0)
    calls = Rates(flops=1e30, bytes=1e30, call=2.0)
    for rates, seconds in ((products, 2 * 8 * 16 * 32 / 1e3), (copies, (16 * 32 + 8 * 16 + 8 * 32) * FLOAT / 1e3)):
        with torch.no_grad(), Trace(linear, rates) as trace:
            linear(x)
        assert trace.seconds == pytest.approx(seconds, rel=1e-3)
    with torch.no_grad(), Trace(linear, calls) as trace:
        x + x
    assert trace.seconds == pytest.approx(2.0)


def test_real_masks_say_how_many(linear):
    mask = torch.tensor([[True, False, True], [False, True, False]])
    with Trace(linear):
        values = torch.empty(3, device="meta", requires_grad=True)
        scattered = torch.zeros(2, 3, device="meta").masked_scatter(mask, values)
        assert scattered[mask].shape == (3,)
        assert torch.masked_select(scattered, mask).shape == (3,)
        scattered.sum().backward()
        assert values.grad.shape == (3,)
        assert int(mask.sum()) == 3  # what is real, stays real


def test_half_precision_halves_what_products_keep(linear):
    with Trace(linear, precision="bf16-mixed") as trace:
        x = torch.empty(8, 16, device="meta", requires_grad=True)
        before = trace.live
        y = linear(x)
        assert y.dtype == torch.bfloat16
        # The halved weight and input stay for the backward pass, beside the output.
        assert trace.live - before == (16 * 32 + 8 * 16 + 8 * 32) * 2


def test_products_that_a_cpu_leaves_to_onednn(linear):
    """Each shape once: those of 16-bit numbers, and those of layers that were told so."""
    rows = [torch.empty(n, 16, device="meta") for n in (8, 8, 9)]
    with Trace(linear) as trace:
        for x in rows:
            linear(x)
    assert not trace.met
    with Trace(linear, precision="bf16-mixed") as trace:
        for x in rows:
            linear(x).sum().backward()
    assert len(trace.met) == 4  # forward, and backward to the weight
    linear = OneDNNLinear(16, 32, bias=False, device="meta")
    with Trace(linear) as trace:
        for x in rows:
            linear(x)
    assert len(trace.met) == 2 and trace.flops == 2 * 25 * 16 * 32


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("cuda", torch.bfloat16)])
def test_in_half_precision_a_cpu_attends_in_float32(linear, device, dtype):
    kept = []
    with Trace(linear, precision="bf16-mixed", device=device):
        q, k, v = (torch.empty(1, 2, 5, 8, device="meta", requires_grad=True) for _ in "qkv")
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert {t.dtype for t in kept if t.shape == q.shape} == {dtype}


def saved_by(loss_of, model):
    """Bytes that autograd really keeps for the backward pass, without the model's own."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = loss_of(model)
    floats = [t for t in kept if t.is_floating_point() and t.untyped_storage().data_ptr() not in own]
    return bytes_of([*floats, loss])


def test_a_models_activations_are_those_that_autograd_keeps(model_config, policy, tokenizer):
    batch = pack([[5] * n for n in (20, 31, 7, 44, 12, 40)], 0)
    learned = torch.arange(1, 40)

    def loss_of(model):
        hidden = packed_hidden(model, batch)[learned - 1]
        return -token_logprobs(next_token_logits(model, hidden), batch.tokens[learned]).sum()

    blank = blank_policy(model_config, tokenizer).train()
    with Trace(blank) as trace:
        before = trace.live
        loss = loss_of(blank)
        kept = trace.live - before
    assert loss.requires_grad
    assert kept == pytest.approx(saved_by(loss_of, policy.train()), rel=0.03)


def test_the_peak_of_a_step_has_the_old_gradients(linear):
    with Trace(linear) as trace:
        for _ in range(2):  # Lightning computes the loss first, then drops the gradients
            loss = linear(torch.empty(1024, 16, device="meta")).sum()
            linear.zero_grad()
            loss.backward()
            del loss
    assert trace.peak >= (2 * 16 * 32 + 1024 * (16 + 32)) * FLOAT


HEAP = """
import ctypes, random, sys
import torch
from lit_rlhf.models.kernels import keep_freed_memory
from lit_rlhf.training import resident_bytes
from lit_rlhf.training.trace import Heap
if sys.argv[1] == "True":
    keep_freed_memory()
earlier = [torch.ones(2**18, dtype=torch.uint8) for _ in range(128)]
del earlier[::2]  # room that is in RAM
heap, begun, blocks, draw = Heap.of_this_system(), resident_bytes(), [], random.Random(0)
for _ in range(40):
    for _ in range(8):
        size = draw.randrange(2**16, 2**21)
        blocks.append(heap.take(size))
        ctypes.memset(blocks[-1], 1, size)
    for _ in range(draw.randrange(12)):
        if blocks:
            heap.give_back(blocks.pop(draw.randrange(len(blocks))))
    print(heap.held, resident_bytes() - begun)
"""


@pytest.mark.skipif(Heap.of_this_system() is None, reason="no such heap here")
@pytest.mark.parametrize("keep", [True, False])
def test_the_heap_is_what_a_process_takes_that_writes_to_its_blocks(keep):
    # In a process of its own: what other tests have left in the heap would be taken first.
    said = subprocess.run([sys.executable, "-c", HEAP, str(keep)], capture_output=True, text=True, check=True).stdout
    held, taken = zip(*([int(x) / 2**20 for x in line.split()] for line in said.splitlines()))  # MiB
    assert held == pytest.approx(taken, rel=0.02, abs=1)
    assert held[0] < 8 * 2 and max(held) > 64


def test_state_of_an_optimizer():
    assert optimizer_bytes(adamw) == 2 * FLOAT
    assert optimizer_bytes(lambda groups: torch.optim.SGD(groups, lr=0.1)) == 0
    assert optimizer_bytes(lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9)) == FLOAT


def test_rates_are_measured():
    rates = measure_rates(64, torch.device("cpu"), torch.float32, seconds=0.02)
    assert all(rate > 0 for rate in rates)
    assert rates.flops > 1e8 and rates.bytes > 1e8 and rates.call < 1e-2
