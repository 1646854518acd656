"""Checkpoints under LoRA: adapters and what trains with them, not the frozen base; a base that changed is noticed."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lit_rlhf.errors import UserError
from lit_rlhf.models import LoRA, add_lora
from lit_rlhf.stages import SFTDataModule, SFTModule
from lit_rlhf.text.records import write_jsonl
from lit_rlhf.training import adamw, make_trainer, trained_state, warmup_decay
from lit_rlhf.training.resuming import LastCheckpoint, RandomState
from lit_rlhf.training.trained_state import weights_fingerprint

KINDS = {
    "plain": LoRA(r=2),
    "DoRA and dropout": LoRA(r=2, use_dora=True, lora_dropout=0.2),
    "biases and a whole module": LoRA(r=2, bias="all", modules_to_save=["lm_head"]),
}


STEADY = partial(warmup_decay, shape="constant", warmup=0.0)  # whatever the number of steps


@pytest.fixture
def run(tmp_path, tokenizer, policy):
    rows = [{"prompt": f"What is {i}?", "response": f"It is {i}."} for i in range(16)]
    write_jsonl(tmp_path / "rows.jsonl", rows)

    def make(lora, steps, resume=None, change=0.0):
        torch.manual_seed(0)
        model = copy.deepcopy(policy)
        with torch.no_grad():
            next(model.base_model.parameters()).view(-1)[3] += change
        module = SFTModule(add_lora(model, lora), tokenizer, optimizer=partial(adamw, lr=1e-2), schedule=STEADY)
        data = SFTDataModule(tmp_path / "rows.jsonl", tokenizer, batch_size=4, held_out=0.2)
        last = LastCheckpoint(tmp_path / "checkpoints", 1)
        trainer = make_trainer(
            accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path, max_steps=steps,
            callbacks=[RandomState(), last],
        )  # fmt: skip
        data.setup()
        trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
        return module, last.path

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_resume_equals_an_uninterrupted_run(kind, run, tmp_path):
    for steps, resume in (
        (2, None),
        (4, tmp_path / "checkpoints" / "last.ckpt"),
        (6, tmp_path / "checkpoints" / "last.ckpt"),
    ):
        parts, path = run(KINDS[kind], steps, resume)
    kept = torch.load(path, weights_only=True)["state_dict"]
    learned = {f"policy.{n}" for n, p in parts.policy.named_parameters() if p.requires_grad}
    assert learned <= kept.keys()
    assert not kept.keys() & {f"policy.{n}" for n, p in parts.policy.named_parameters() if not p.requires_grad}
    whole, _ = run(KINDS[kind], 6)
    for (name, a), b in zip(whole.policy.state_dict().items(), parts.policy.state_dict().values()):
        assert torch.equal(a, b), name


def test_the_frozen_base_is_not_in_the_file(run):
    _, path = run(LoRA(r=2), 1)
    adapters = path.stat().st_size
    _, path = run(None, 1)
    assert adapters < path.stat().st_size / 4


def test_a_base_that_has_changed_since_is_noticed(run):
    _, path = run(LoRA(r=2), 1)
    with pytest.raises(UserError, match="the checkpoint's adapters belong on another policy than this one"):
        run(LoRA(r=2), 2, path, change=1e-3)


def test_weights_that_are_missing_are_an_error(run):
    module, _ = run(LoRA(r=2), 1)
    state = module.state_dict()
    name = next(n for n in state if "lora_A" in n)
    del state[name]
    with pytest.raises(UserError, match=name):
        module.load_state_dict(state)
    with pytest.raises(UserError, match="odd"):
        module.load_state_dict({**module.state_dict(), "odd": torch.ones(1)})


def test_a_fingerprint_never_widens_a_whole_matrix(monkeypatch):
    class Sums(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket is torch.ops.aten.sum:
                sizes.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    weights, sizes = torch.randn(30, 70), []
    whole = weights_fingerprint(iter([weights]))
    monkeypatch.setattr(trained_state, "PIECE", 100)
    with Sums():
        assert weights_fingerprint(iter([weights])) == whole
    assert sizes == [100] * 21


def test_a_fingerprint_sees_any_number_in_any_precision():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        weights = nn.Linear(300, 70).to(dtype).weight.detach()
        known = weights_fingerprint(iter([weights]))
        assert weights_fingerprint(iter([weights.clone()])) == known
        for place in (0, 1, 12345, -1):
            other = weights.clone()
            other.view(-1)[place] += 0.01
            assert weights_fingerprint(iter([other])) != known
