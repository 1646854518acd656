"""Batches that are learned in parts: every stage comes to the weights that it comes to with whole batches."""

import copy

import pytest
import torch
from torch.testing import assert_close

from lit_rlhf.models import chunked
from lit_rlhf.stages import (
    ClassifyDataModule,
    ClassifyModule,
    DPODataModule,
    DPOModule,
    PretrainModule,
    RewardDataModule,
    RewardModule,
    SFTModule,
    WorldPretrainDataModule,
    WorldSFTDataModule,
)
from lit_rlhf.text.records import write_jsonl
from lit_rlhf.training.parts import LearnsInParts

RANKINGS = [
    {"prompt": f"Question {i}?", "responses": ["good " * (i % 3 + 1), "bad", "so"], "ranks": [1, 3, 1 + i % 5]}
    for i in range(40)
]
RATED = [{"prompt": f"Why {i}?", "response": "so " * (i % 5 + 1), "rating": i % 2} for i in range(20)]
TEXTS = [{"text": f"{'red blue ' * (i % 3)}{i}?", "label": i % 3} for i in range(40)]


@pytest.fixture
def stage(norms_in_float64, world, tokenizer, policy, reward_model, optimizer, tmp_path):
    """(name of a stage) -> (module, data), the same each time."""
    for name, rows in (("rankings", RANKINGS), ("rated", RATED), ("texts", TEXTS)):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    start, scorer = policy.double(), reward_model.double()

    def make(name):
        own = copy.deepcopy(tokenizer)
        if name == "pretrain":
            data = WorldPretrainDataModule(world, own, documents=200, block_size=32, batch_size=6)
        elif name == "sft":
            data = WorldSFTDataModule(world, own, demonstrations=64, batch_size=6)
        elif name == "reward":
            feedback = {"feedback": tmp_path / "rated.jsonl", "held_out": 0.2}
            data = RewardDataModule(tmp_path / "rankings.jsonl", own, batch_size=6, **feedback)
        elif name == "dpo":
            data = DPODataModule(tmp_path / "rankings.jsonl", own, batch_size=6, held_out=0.2)
        else:
            data = ClassifyDataModule(tmp_path / "texts.jsonl", own, batch_size=6, held_out=0.2)
        data.setup()
        if name == "reward":
            return RewardModule(copy.deepcopy(scorer), own, optimizer=optimizer), data
        kind = {"pretrain": PretrainModule, "sft": SFTModule, "dpo": DPOModule, "classify": ClassifyModule}[name]
        model = copy.deepcopy(start)
        model.resize_token_embeddings(len(own), mean_resizing=False)
        takes = {"labels": data.for_module()["labels"]} if name == "classify" else {}
        return kind(model, own, **takes, optimizer=optimizer), data

    return make


@pytest.fixture
def logged(monkeypatch):
    """Losses of the training steps, as they are logged."""
    losses = []

    def log(self, name, value, **settings):
        if self.trainer.training and name.endswith("/loss"):
            losses.append(value.item())
        plain(self, name, value, **settings)

    plain = LearnsInParts.log
    monkeypatch.setattr(LearnsInParts, "log", log)
    return losses


# Gradients of large embeddings are added in their place.
@pytest.mark.parametrize(("accumulate", "large"), [(1, False), (2, True)])
@pytest.mark.parametrize("name", ["pretrain", "sft", "reward", "dpo", "classify"])
def test_weights_and_losses_are_those_of_whole_batches(name, accumulate, large, stage, fit, logged, monkeypatch):
    found = []
    for kept_gib in (0.5, 2e-5):
        if large and kept_gib < 0.5:
            monkeypatch.setattr(chunked, "LOGITS", 4096)
        torch.manual_seed(0)
        module, data = stage(name)
        settings = {"accumulate_grad_batches": accumulate, "kept_gib": kept_gib, "gradient_clip_val": 0.5}
        fit(module, data, precision="64-true", max_steps=3, log_every_n_steps=1, **settings)
        first = next(iter(data.train_dataloader()))
        assert isinstance(first, list) == (kept_gib < 0.5)
        found.append((list(module.parameters()), logged[:]))
        logged.clear()
    (whole, losses), (parts, losses_in_parts) = found
    assert len(losses) == 3 * accumulate
    assert_close(losses_in_parts, losses, rtol=1e-5, atol=1e-7)
    for one, other in zip(whole, parts):
        assert_close(other, one, rtol=1e-5, atol=1e-7)


def test_a_part_has_as_many_examples_as_fit_and_at_least_one(stage):
    _, data = stage("sft")
    sizes = [sum(map(len, data.sequences(item))) for item in data.train_set]
    data.learned_at_once = max(sizes) + min(sizes)
    order = data.train_dataloader().order(0)
    for batch in data.train_dataloader():
        packed = [part.batch.packed for part in batch]
        assert all(len(p.lengths) == 1 or int(p.lengths.sum()) <= data.learned_at_once for p in packed)
        assert sum(part.share for part in batch) == pytest.approx(1)
        assert [int(n) for p in packed for n in p.lengths] == [sizes[i] for i in order[:6]]
        order = order[6:]


def test_validation_reads_what_it_read_in_batches_of_so_many_tokens(stage):
    _, data = stage("sft")
    most = max(sum(map(len, data.sequences(item))) for item in data.val_set)
    whole = [int(n) for batch in data.val_dataloader() for n in batch.packed.lengths]
    data.read_at_once = most + 5
    batches = list(data.val_dataloader())
    assert len(batches) == len(data.val_dataloader()) > 1
    assert [int(n) for batch in batches for n in batch.packed.lengths] == whole
    assert all(len(b.packed.lengths) == 1 or int(b.packed.lengths.sum()) <= most + 5 for b in batches)
