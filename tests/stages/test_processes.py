"""Two and three processes come to the weights and figures of one that takes as large steps."""

import copy
import signal
import sys
from contextlib import suppress
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim import SGD
from torch.testing import assert_close

from lit_rlhf.errors import Interrupted, UserError
from lit_rlhf.models import TextRewardModel
from lit_rlhf.stages import (
    EvaluateModule,
    FewShotModule,
    PPOModule,
    PreferenceModule,
    WorldEvaluateDataModule,
    WorldFewShotDataModule,
    WorldPreferenceDataModule,
    WorldPretrainDataModule,
)
from lit_rlhf.stages.ppo import KLPenalty, MonteCarlo, Scoring
from lit_rlhf.stages.ppo.loss import KLPenaltyLoss
from lit_rlhf.text.records import text_of
from lit_rlhf.text.world import SimulatedLabeler
from lit_rlhf.training import make_trainer

pytestmark = pytest.mark.slow
STEP = 6  # examples of an optimizer step, of all processes


class StopsAt(Callback):
    """A signal that asks to stop, in the step of that number."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            signal.raise_signal(signal.SIGTERM)


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
    "a batch's mean, a reward model that is asked by text": {
        "advantage": MonteCarlo(baseline="batch"), "minibatch_size": 6, "by_text": True,
    },
    "several answers, text, minibatches that end unevenly": {
        "advantage": MonteCarlo(baseline="others"), "answers_per_prompt": 3, "minibatch_size": 12, "ptx_coef": 0.5,
    },
    "a scale that runs, functions that say nothing": {
        "scoring": Scoring(functions=[functions_too], scale="running"), "minibatch_size": 6,
        "kl": KLPenalty(adaptive=True, target=0.01), "loss": KLPenaltyLoss(), "probe_rollouts": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PPO)
def test_ppo(name, ppo, prompts, trained, world, reward_model, tokenizer):
    def make():
        settings = {
            **copy.deepcopy(PPO[name]),
            "optimizer": lambda groups: SGD(groups, lr=0.05),
            "val_samples": 2,
            "kind": PPOModule,
        }
        if settings.pop("by_text", False):
            settings["reward_model"] = TextRewardModel(copy.deepcopy(reward_model), tokenizer)
        if "ptx_coef" in settings:
            settings["ptx"] = partial(WorldPretrainDataModule, world, documents=200, block_size=24, held_out=0.1)
        torch.manual_seed(0)
        return ppo(**settings), prompts(limit_held_out=7)

    [one] = trained(make, 1, max_steps=-1, max_epochs=1, limit_train_batches=3)
    for number in (2, 3):
        for each in trained(make, number, max_steps=-1, max_epochs=1, limit_train_batches=3):
            assert_close(each, one, rtol=1e-6, atol=1e-7)


@pytest.fixture
def asked(in_processes):
    """(run a trainer, number of processes) -> what it returns in each of them."""

    def run(work, number):
        several = {"devices": number, "strategy": "ddp"} if number > 1 else {}

        def whole():
            return work(make_trainer("cpu", logger=False, enable_progress_bar=False, **several))

        return in_processes(number, whole) if number > 1 else [whole()]

    return run


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (1, 2)])
def test_training_goes_on_with_another_number_of_processes(before, after, stages, fit, in_processes, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)

    def train(number, callbacks=(), **settings):
        def work():
            module, data = stages["sft"]()
            module.optimizer, data.batch_size = lambda groups: SGD(groups, lr=0.1), STEP // number
            several = {"devices": number, "strategy": "ddp"} if number > 1 else {}
            with suppress(Interrupted):
                fit(module, data, callbacks=callbacks, precision="64-true", max_epochs=2, **several, **settings)
            return [p.detach().clone() for p in module.parameters()]

        return in_processes(number, work)

    [whole] = train(1, folder="whole")
    train(before, [StopsAt(8)])  # of six steps an epoch
    for each in train(after, resume=True):
        assert_close(each, whole, rtol=1e-6, atol=1e-8)


class EndsOne(Callback):
    """A signal ends one of the processes while the others wait for it."""

    def on_validation_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == trainer.global_rank == 1:
            signal.raise_signal(signal.SIGTERM)


def test_a_signal_outside_of_training_ends_its_process_at_once(stages, fit, in_processes):
    """Lightning's own handler would have all processes broadcast, whatever they are in the middle of."""

    def validate():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))  # as the command does
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)  # else they wait for each other for half an hour
        module, data = stages["sft"]()
        data.read_at_once = 300  # several batches
        trainer = make_trainer("cpu", 2, strategy="ddp", callbacks=[EndsOne()], logger=False, enable_progress_bar=False)
        with pytest.raises((SystemExit, RuntimeError)) as found:
            trainer.validate(module, datamodule=data, verbose=False)
        return found.type

    assert in_processes(2, validate) == [RuntimeError, SystemExit]


@pytest.mark.parametrize("name", ["sft", "reward", "dpo"])
def test_more_processes_than_examples_are_refused(name, stages, fit, in_processes):
    def train():
        module, data = stages[name]()
        data.limit = 2
        with pytest.raises(UserError) as found:
            fit(module, data, max_epochs=1, devices=3, strategy="ddp")
        return str(found.value)

    said = in_processes(3, train)
    assert said[0] == said[1] == said[2]
    assert said[0].startswith("there are 2 sequences to train on, less than the 3 of one step (batch_size=1 times 3 ")


class Labeler:
    """Counts what it is asked: it must be one process that asks, in the order of the batches."""

    def __init__(self, world):
        self.rank, self.prompts = SimulatedLabeler(world), []

    def __call__(self, prompts, responses):
        self.prompts += [text_of(prompt[-1]) for prompt in prompts]
        return self.rank(prompts, responses)


@pytest.mark.parametrize("begun_by", [None, 1, 3])
def test_preferences(begun_by, policy, world, tokenizer, short, asked, tmp_path):
    def collect(trainer, batches=1.0, file="progress.jsonl"):
        data = WorldPreferenceDataModule(world, tokenizer, prompts=21, batch_size=4, limit_held_out=4)
        data.setup()  # 25 prompts in 7 batches
        labeler = Labeler(world)
        module = PreferenceModule(
            copy.deepcopy(policy), tokenizer, labeler, gold_judge=world, sampling=short, progress_file=tmp_path / file
        )  # fmt: skip
        trainer.limit_predict_batches = batches
        trainer.predict(module, datamodule=data, return_predictions=False)
        return module.answers, [module.records, module.figures()] if trainer.is_global_zero else None, labeler.prompts

    [one] = asked(partial(collect, file="whole.jsonl"), 1)
    whole = (tmp_path / "whole.jsonl").read_text().splitlines()
    for number in (2, 3):
        files = [tmp_path / "progress.jsonl", tmp_path / "progress.ranks.jsonl"]
        known = 0
        if begun_by:
            asked(partial(collect, batches=1), begun_by)
            known = len(files[0].read_text().splitlines())
            assert known == begun_by
        first, *others = asked(collect, number)
        assert first[:2] == one[:2] and first[2] == one[2][-len(first[2]) :]
        assert all(answers == one[0] and not prompts for answers, _, prompts in others)
        assert files[0].read_text().splitlines() == whole and len(files[1].read_text().splitlines()) == 7
        for file in files:
            file.unlink()


def test_evaluation(policy, reward_model, world, tokenizer, short, asked, tmp_path):
    torch.manual_seed(5)
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))

    def evaluate(trainer):
        data = WorldEvaluateDataModule(world, tokenizer, batch_size=3, limit_held_out=11, text_documents=9)
        data.setup()
        labeler = Labeler(world)
        policies = {name: (copy.deepcopy(model), tokenizer) for name, model in (("base", other), ("sft", policy))}
        module = EvaluateModule(
            policies, copy.deepcopy(reward_model), **data.for_module(), annotator=labeler, samples=2, best_of=3,
            sampling=short,
        )  # fmt: skip
        trainer.test(module, datamodule=data, verbose=False)
        if not trainer.is_global_zero:
            return labeler.prompts
        module.export(tmp_path)
        return module.figures(), (tmp_path / "samples.jsonl").read_text(), labeler.prompts

    [one] = asked(evaluate, 1)
    for number in (2, 3):
        first, *others = asked(evaluate, number)
        assert first[1:] == one[1:] and first[0] == one[0]
        assert others == [[]] * (number - 1)


def test_few_shot(policy, world, tokenizer, asked):
    def ask(trainer, task):
        data = WorldFewShotDataModule(
            world, tokenizer, task=task, examples=40, shots=(0, 2), batch_size=3, limit_held_out=13
        )
        data.setup()
        module = FewShotModule(copy.deepcopy(policy), tokenizer, max_new_tokens=4)
        trainer.test(module, datamodule=data, verbose=False)
        return module.answers, module.figures()

    for task in ("choice", "answer"):
        [one] = asked(partial(ask, task=task), 1)
        for number in (2, 3):
            assert asked(partial(ask, task=task), number) == [one] * number
