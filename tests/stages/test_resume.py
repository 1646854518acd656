"""A stage that was stopped and goes on gives the weights of one that was not, to the bit."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lit_rlhf.models import Sampling
from lit_rlhf.stages import (
    PPOModule,
    PreferenceModule,
    PretrainModule,
    RewardModule,
    SFTModule,
    WorldPPODataModule,
    WorldPreferenceDataModule,
    WorldPretrainDataModule,
    WorldRewardDataModule,
    WorldSFTDataModule,
)
from lit_rlhf.text import write_jsonl
from lit_rlhf.text.world import SimulatedLabeler
from lit_rlhf.training import make_trainer


class Stop(Exception):
    """A process that is killed after some batches."""


class StopAfter(Callback):
    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx >= self.batches:
            raise Stop


@pytest.fixture
def rankings(tmp_path, world):
    demonstrations = world.demonstrations(160, 3)
    held_out = world.demonstrations(40, 3, split="held_out")
    labeler = SimulatedLabeler(world)
    rows = []
    for row in [*demonstrations, *held_out]:
        responses = [row["response"], "I do not know.", world.best_answer(row["prompt"])]
        ranks = labeler([row["prompt"]], [responses])[0]
        rows.append({"prompt": row["prompt"], "responses": responses, "ranks": ranks})
    write_jsonl(tmp_path / "rankings.jsonl", rows)
    return tmp_path / "rankings.jsonl"


@pytest.fixture
def stage(request, world, tokenizer, policy, reward_model, rankings, optimizer):
    """() -> (module, data, batches in all)"""
    sampling = Sampling(max_new_tokens=6)
    make = {
        "pretrain": lambda: (
            PretrainModule(copy.deepcopy(policy), tokenizer, optimizer=optimizer),
            WorldPretrainDataModule(world, tokenizer, documents=200, block_size=32, batch_size=32),
        ),
        "sft": lambda: (
            SFTModule(copy.deepcopy(policy), tokenizer, optimizer=optimizer),
            WorldSFTDataModule(world, tokenizer, demonstrations=40, batch_size=8),
        ),
        "reward": lambda: (
            RewardModule(copy.deepcopy(reward_model), tokenizer, optimizer=optimizer),
            WorldRewardDataModule(rankings, tokenizer, world, batch_size=32),
        ),
        "ppo": lambda: (
            PPOModule(
                copy.deepcopy(policy), copy.deepcopy(reward_model), tokenizer, optimizer=optimizer, sampling=sampling,
                minibatch_size=4, ppo_epochs=2,
            ),
            WorldPPODataModule(world, tokenizer, prompts=64, batch_size=8),
        ),
    }  # fmt: skip
    return make[request.param]


ITERATIONS = {"max_epochs": 1, "limit_train_batches": 9}


@pytest.mark.parametrize("batches", [1, 4, 5, 7])  # 5 is the last batch of an epoch of SFT and of the reward model
@pytest.mark.parametrize(
    ("stage", "budget"),
    [
        ("pretrain", {"max_steps": 9}),
        ("sft", {"max_steps": 9}),
        ("sft", {"max_epochs": 3}),
        ("reward", {"max_epochs": 2}),
        ("ppo", ITERATIONS),
    ],
    indirect=["stage"],
)
def test_stopped_and_resumed_equals_uninterrupted(stage, budget, batches, fit):
    whole, data = stage()
    fit(whole, data, "whole", **budget)
    stopped, data = stage()
    with pytest.raises(Stop):
        fit(stopped, data, "parts", callbacks=[StopAfter(batches)], every=1, **budget)
    resumed, data = stage()
    torch.manual_seed(99)  # a new process has other random numbers
    fit(resumed, data, "parts", resume=True, **budget)
    assert any((a != b).any() for a, b in zip(stopped.parameters(), whole.parameters()))
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(a, b), name


def test_collection_that_was_killed_ends_with_the_same_records(tmp_path, world, tokenizer, policy, short):
    def collect(journal, limit=1.0):
        module = PreferenceModule(
            policy, tokenizer, SimulatedLabeler(world), answers_per_prompt=3, sampling=short, journal=journal
        )
        data = WorldPreferenceDataModule(world, tokenizer, prompts=24, batch_size=8, limit_held_out=8)
        data.setup()
        trainer = make_trainer("cpu", logger=False, enable_progress_bar=False, limit_predict_batches=limit)
        trainer.predict(module, datamodule=data, return_predictions=False)
        return module

    whole = collect(tmp_path / "whole.jsonl")
    collect(tmp_path / "parts.jsonl", limit=2)
    with (tmp_path / "parts.jsonl").open("a") as file:
        file.write('[2, [{"prompt": "half a li')  # killed while it wrote
    resumed = collect(tmp_path / "parts.jsonl")
    assert resumed.records == whole.records
    assert len(whole.records) == 32
    assert len((tmp_path / "parts.jsonl").read_text().splitlines()) == 4
