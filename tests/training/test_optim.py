import copy

import pytest
import torch
from lightning import LightningModule
from torch import nn
from torch.testing import assert_close

from lit_rlhf.errors import UserError
from lit_rlhf.functional import orthogonalize
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
    assert len(adamw([a, b]).param_groups) == 1  # as PyTorch's, of parameters that are in no groups


def test_muon_by_hand():
    torch.manual_seed(0)
    matrix, table, scale = torch.randn(9, 4).double(), torch.randn(5, 6).double(), torch.ones(6).double()
    own = [nn.Parameter(t.clone()) for t in (matrix, table, scale)]
    groups = [{"params": own[:2], "hidden": [True, False]}, {"params": own[2:], "weight_decay": 0.0}]
    ours = adamw(groups, lr=0.02, betas=[0.8, 0.9], weight_decay=0.1, matrix_lr=0.3)
    rest = [nn.Parameter(table.clone()), nn.Parameter(scale.clone())]
    theirs = adamw([{"params": rest[:1]}, {"params": rest[1:], "weight_decay": 0.0}], 0.02, [0.8, 0.9], 0.1)
    average = torch.zeros(9, 4).double()
    for _ in range(4):
        for p in own:
            p.grad = torch.randn_like(p)
        for p, q in zip(rest, own[1:]):
            p.grad = q.grad.clone()
        average = 0.95 * average + 0.05 * own[0].grad
        step = orthogonalize(0.05 * own[0].grad + 0.95 * average)
        matrix = matrix * (1 - 0.3 * 0.1) - 0.3 * 1.5 * step  # the root of 9 / 4
        ours.step(), theirs.step()
    assert_close(own[0].data, matrix)
    assert_close([p.data for p in own[1:]], [p.data for p in rest], rtol=0, atol=0)


def test_muon_is_for_matrices_between_hidden_states(policy):
    [first, matrices, vectors] = adamw(decay_groups(policy), lr=0.1, matrix_lr=0.2).param_groups
    rest = [first, vectors]
    assert [(group["hidden"], group["lr"]) for group in (first, matrices, vectors)] == [
        (False, 0.1),
        (True, 0.2),
        (False, 0.1),
    ]
    names = {id(p): name for name, p in policy.named_parameters()}
    in_muon = {names[id(p)] for p in matrices["params"]}
    assert len(in_muon) > 7 and all(".h." in name or ".layers." in name for name in in_muon)
    others = {names[id(p)]: p.dim() for group in rest for p in group["params"]}
    assert in_muon | others.keys() == {*names.values()}
    assert all(
        "wte" in name or "wpe" in name or "embed" in name or "lm_head" in name for name, d in others.items() if d > 1
    )


def test_muon_has_nothing_to_offload():
    with pytest.raises(UserError, match=r"offload=True \(optimizer\) .*leave matrix_lr at None"):
        adamw([nn.Parameter(torch.ones(2, 2))], matrix_lr=0.1, offload=True)


def test_a_closure_of_muon_has_all_gradients(policy):
    optimizer = adamw(decay_groups(policy), lr=0.1, matrix_lr=0.1)
    seen = []

    def closure():
        seen.append([p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None])
        optimizer.zero_grad()
        loss = sum(p.sum() for p in policy.parameters())
        loss.backward()
        return loss.detach()

    losses = [optimizer.step(closure) for _ in range(2)]
    assert losses[1] < losses[0] and len(seen[1]) == len([*policy.parameters()])
    assert all((p.grad == 1).all() for p in policy.parameters())  # of the second step alone


def test_muon_goes_on_from_its_state(policy):
    def steps(optimizer, model, which):
        for seed in which:
            generator = torch.Generator().manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    whole, parts = copy.deepcopy(policy), copy.deepcopy(policy)
    steps(adamw(decay_groups(whole), lr=1e-2, matrix_lr=0.1), whole, range(4))
    first = adamw(decay_groups(parts), lr=1e-2, matrix_lr=0.1)
    steps(first, parts, range(2))
    again = adamw(decay_groups(parts), lr=1.0, matrix_lr=1.0)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(again, parts, range(2, 4))
    for a, b in zip(whole.parameters(), parts.parameters()):
        assert torch.equal(a, b)
    numbers = [sum(t.numel() for t in state.values()) for state in first.state.values()]
    assert sum(numbers) < 1.9 * sum(p.numel() for p in policy.parameters())


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
