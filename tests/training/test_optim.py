import copy

import pytest
import torch
from lightning import LightningModule
from torch import nn
from torch.testing import assert_close

from lit_rlhf.training import adamw, make_trainer, warmup_decay
from lit_rlhf.training.batches import BatchLoader, in_order
from lit_rlhf.training.optim import decay_groups, optimizer_and_schedule


def rates(total, steps, **settings):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = warmup_decay(optimizer, total, **settings)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"] / 2.0)
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # ten steps, the first two warm up; then 0, 1/8 ... 7/8 of the way down to 0.1, and 0.1 for ever
        ("linear", [0.5, 1, 1, 0.8875, 0.775, 0.6625, 0.55, 0.4375, 0.325, 0.2125, 0.1, 0.1]),
        ("cosine", [0.5, 1, 1, 0.965746, 0.868198, 0.722208, 0.55, 0.377792, 0.231802, 0.134254, 0.1, 0.1]),
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_warmup_decay_by_hand(shape, expected):
    assert rates(10, 12, shape=shape, warmup=0.2, floor=0.1) == pytest.approx(expected, abs=1e-6)


def test_the_ends_of_the_schedule():
    assert rates(4, 5, shape="linear", warmup=0.0, floor=0.0) == pytest.approx([1, 1, 2 / 3, 1 / 3, 0])
    assert rates(4, 4, shape="cosine", warmup=1.0) == pytest.approx([0.25, 0.5, 0.75, 1])
    assert rates(1, 3, floor=0.5) == pytest.approx([1, 1, 0.5])  # a budget of one step


def test_weight_decay_is_for_matrices_only():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 5, bias=False))
    model[3].weight = model[0].weight  # tied: one parameter
    model[1].requires_grad_(False)
    matrices, others = decay_groups(model, lr=0.5)
    assert [p is q for p, q in zip(matrices["params"], [model[0].weight], strict=True)] == [True]
    assert [p is q for p, q in zip(others["params"], [model[2].weight, model[2].bias], strict=True)] == [True, True]
    optimizer = adamw([matrices, others], lr=0.1, weight_decay=0.3)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 0.3), (0.5, 0.0)]


def test_adamw_is_pytorchs():
    torch.manual_seed(0)
    a, b = (nn.Parameter(torch.tensor([[1.0, -2.0, 3.0]])) for _ in range(2))
    ours = adamw([a], lr=0.01, betas=[0.8, 0.9], weight_decay=0.1)
    theirs = torch.optim.AdamW([b], lr=0.01, betas=(0.8, 0.9), weight_decay=0.1, fused=False)
    for _ in range(5):
        a.grad = torch.randn(1, 3)
        b.grad = a.grad.clone()
        ours.step(), theirs.step()
    assert_close(a, b)


class Linear(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.total, self.rates = 0, []

    def training_step(self, batch, batch_idx):
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return self.layer(torch.ones(1)).sum()

    def schedule(self, optimizer, total):
        self.total = total
        return warmup_decay(optimizer, total, shape="linear", warmup=0.5, floor=0.0)

    def configure_optimizers(self):
        return optimizer_and_schedule(self, [{"params": self.layer.parameters()}], adamw, self.schedule)


@pytest.mark.parametrize(
    ("settings", "total"),
    [({"max_steps": 4}, 4), ({"max_epochs": 2}, 12), ({"max_epochs": 2, "accumulate_grad_batches": 3}, 4)],
)
def test_the_schedule_runs_over_the_whole_budget_of_steps(settings, total):
    module = Linear()
    batches = BatchLoader(in_order(6), 1, lambda mine, _: mine)
    make_trainer("cpu", logger=False, enable_progress_bar=False, **settings).fit(module, batches)
    assert module.total == total
    micro = settings.get("accumulate_grad_batches", 1)
    half = total // 2
    by_hand = [(step + 1) / half for step in range(half)] + [1 - step / half for step in range(half)]
    assert module.rates == pytest.approx([5e-5 * rate for rate in by_hand for _ in range(micro)])


def groups_of(model):
    decayed, plain = decay_groups(model, weight_decay=0.1)
    return [decayed, {**plain, "lr": 3e-3}]


def test_offloaded_adam_comes_to_the_same_bits():
    """On a CPU: the state has nowhere to go, but each parameter is stepped alone, with its group's settings."""
    torch.manual_seed(0)
    ordinary = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    offloaded = copy.deepcopy(ordinary)
    frozen = [model[0].bias.requires_grad_(False) for model in (ordinary, offloaded)]
    one, two = adamw(groups_of(ordinary)), adamw(groups_of(offloaded), offload=True)
    schedules = [warmup_decay(optimizer, 8) for optimizer in (one, two)]
    for step in range(8):
        x = torch.randn(4, 5)
        for model, optimizer, schedule in zip((ordinary, offloaded), (one, two), schedules):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            schedule.step()
        if step == 3:  # as after a checkpoint
            state = two.state_dict()
            assert len(state["param_groups"]) == 2 and len(state["state"]) == 5
            two.load_state_dict(copy.deepcopy(state))
    for a, b in zip(ordinary.parameters(), offloaded.parameters()):
        assert torch.equal(a, b)
    assert len(frozen) == 2 and all(
        a["exp_avg"].equal(b["exp_avg"]) for a, b in zip(one.state.values(), two.state.values())
    )


def test_offloaded_adam_calls_its_closure_once():
    weight = nn.Parameter(torch.ones(2))
    optimizer, calls = adamw([weight], offload=True), []

    def closure():
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == 2.0 and calls == [2.0]
    assert (weight < 1).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloaded_state_is_in_the_cpus_memory_and_the_numbers_are_the_same():
    torch.manual_seed(0)
    ordinary = nn.Linear(64, 64, device="cuda")
    offloaded = copy.deepcopy(ordinary)
    one, two = adamw(groups_of(ordinary)), adamw(groups_of(offloaded), offload=True)
    for _ in range(5):
        x = torch.randn(8, 64, device="cuda")
        for model, optimizer in ((ordinary, one), (offloaded, two)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(ordinary.parameters(), offloaded.parameters()):
        assert torch.equal(a, b)
        assert two.state[b]["exp_avg"].device.type == "cpu" and two.state[b]["exp_avg"].is_pinned()
