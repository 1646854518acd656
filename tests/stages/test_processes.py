"""Two and three processes come to the weights and figures of one that takes as large steps."""

import copy
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim import SGD
from torch.testing import assert_close

from lit_rlhf.stages import PPOModule, WorldPretrainDataModule
from lit_rlhf.stages.ppo import KLPenalty, MonteCarlo, Scoring
from lit_rlhf.stages.ppo.loss import KLPenaltyLoss

STEP = 6  # examples of an optimizer step, of all processes


class Logs(Callback):
    """Keeps the figures of each step and of the last validation."""

    def __init__(self):
        self.training, self.validation = [], {}

    def on_train_batch_end(self, trainer, *_):
        self.training.append({name: x.item() for name, x in trainer.callback_metrics.items() if "val/" not in name})

    def on_validation_end(self, trainer, *_):
        self.validation = {name: x.item() for name, x in trainer.callback_metrics.items() if "val/" in name}


@pytest.fixture
def trained(in_processes, fit, monkeypatch):
    """(make a module and its data, number of processes) -> weights and figures in each of them."""

    def run(make, number, **settings):
        def whole():
            module, data = make()
            data.batch_size, logs = STEP // number, Logs()
            if isinstance(module, PPOModule):
                module.minibatch_size //= number
            several = {"devices": number, "strategy": "ddp"} if number > 1 else {}
            settings.setdefault("max_steps", 4)
            trainer = fit(
                module, data, callbacks=[logs], precision="64-true", log_every_n_steps=1,
                **several, **settings,
            )  # fmt: skip
            trainer.validate(module, datamodule=data, verbose=False)
            weights = [p.detach().clone() for p in module.parameters()]
            figures = {name: x for name, x in module.figures().items() if not isinstance(x, str | list | dict)}
            return logs.training, logs.validation, figures, weights

        monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # as a stage has it
        return in_processes(number, whole) if number > 1 else [whole()]

    return run


@pytest.mark.parametrize("name", ["pretrain", "sft", "reward", "classify", "dpo"])
def test_training_and_validation(name, stages, trained, optimizer):
    def make():
        torch.manual_seed(0)
        module, data = stages[name]()
        # Adam makes of a gradient that is all but 0 a whole step in a direction that rounding decides.
        module.optimizer = lambda groups: SGD(groups, lr=0.1)
        data.read_at_once = 300  # several batches of validation, not the same number for each
        if name == "reward":
            module.lm_coef = 0.5
        return module, data

    [one] = trained(make, 1)
    assert len(one[0]) == 4 and one[1] and one[0][0][f"{name}/loss"] != one[0][3][f"{name}/loss"]
    for number in (2, 3):
        for each in trained(make, number):
            assert_close(each, one, rtol=1e-6, atol=1e-8)  # some sums are in float32 all the same


def functions_too(prompts, responses, **_):
    """Says nothing of every third answer, and of all of some prompts."""
    return [None if len(text) % 3 == 0 else len(text) / 10 for text in responses]


PPO = {
    "gae": {"minibatch_size": 6, "ppo_epochs": 2},
    "a batch's mean, no critic": {"advantage": MonteCarlo(baseline="batch"), "minibatch_size": 6},
    "several answers, text, minibatches that end unevenly": {
        "advantage": MonteCarlo(baseline="others"), "answers_per_prompt": 3, "minibatch_size": 12, "ptx_coef": 0.5,
    },
    "a scale that runs, functions that say nothing": {
        "scoring": Scoring(functions=[functions_too], scale="running"), "minibatch_size": 6,
        "kl": KLPenalty(adaptive=True, target=0.01), "loss": KLPenaltyLoss(), "probe_rollouts": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PPO)
def test_ppo(name, ppo, prompts, trained, world):
    def make():
        settings = {
            **copy.deepcopy(PPO[name]),
            "optimizer": lambda groups: SGD(groups, lr=0.05),
            "val_samples": 2,
            "kind": PPOModule,
        }
        if "ptx_coef" in settings:
            settings["ptx"] = partial(WorldPretrainDataModule, world, documents=200, block_size=24, held_out=0.1)
        torch.manual_seed(0)
        return ppo(**settings), prompts(limit_held_out=7)

    [one] = trained(make, 1, max_steps=-1, max_epochs=1, limit_train_batches=3)
    for number in (2, 3):
        for each in trained(make, number, max_steps=-1, max_epochs=1, limit_train_batches=3):
            assert_close(each, one, rtol=1e-6, atol=1e-7)
