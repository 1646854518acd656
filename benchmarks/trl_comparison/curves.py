"""Part 2: the same task trained by TRL's ``PPOTrainer`` and by our ``PPOModule``, side by side."""

from __future__ import annotations

import copy
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import matplotlib
import torch
from transformers import set_seed

from lit_rlhf.rollouts import Sampling
from lit_rlhf.training import adamw, make_trainer
from trl_comparison.ours import ADAM_BETAS, ppo_module, prompt_data
from trl_comparison.task import LONGEST_ANSWER, Task, train_quietly, trl_trainer

BATCH, MINIBATCHES, EPOCHS, LR = 64, 2, 4, 5e-4  # answers per rollout; minibatches; epochs; of policy and critic
ENDS = 10  # iterations that the last figures are averaged over


class Curve(NamedTuple):
    """What one training logged, an entry an iteration."""

    episodes: list[float]  # answers so far
    score: list[float]  # mean of the rollout
    kl: list[float]  # nats per answer
    seconds: float  # of one core


def train_trl(task: Task, seed: int, iterations: int) -> Curve:
    policy, critic = task.models()
    trainer = trl_trainer(
        task, policy, copy.deepcopy(policy), critic, seed=seed, total_episodes=iterations * BATCH, learning_rate=LR,
        per_device_train_batch_size=BATCH, num_mini_batches=MINIBATCHES, num_ppo_epochs=EPOCHS,
    )  # fmt: skip
    set_seed(seed)  # TRL shuffles with numpy's own generator
    start = time.process_time()
    train_quietly(trainer)
    seconds = time.process_time() - start
    log = trainer.state.log_history
    return Curve(*([entry[n] for entry in log] for n in ("episode", "objective/scores", "objective/kl")), seconds)


def train_ours(task: Task, seed: int, iterations: int) -> Curve:
    module = ppo_module(
        *task.models(), task.tokenizer, sampling=Sampling(LONGEST_ANSWER),
        optimizer=partial(adamw, lr=LR, betas=ADAM_BETAS), critic_lr=LR, critic_head_lr=None, ppo_epochs=EPOCHS,
        minibatch_size=BATCH // MINIBATCHES, seed=seed,
    )  # fmt: skip
    data = prompt_data(task.prompts, task.tokenizer, BATCH, seed)
    log = Log()
    trainer = make_trainer(
        accelerator="cpu", max_epochs=1, limit_train_batches=iterations, log_every_n_steps=1, limit_val_batches=0.0,
        logger=False, enable_progress_bar=False, callbacks=[log],
    )  # fmt: skip
    start = time.process_time()
    trainer.fit(module, data)
    seconds = time.process_time() - start
    return Curve(*([entry[f"ppo/{n}"] for entry in log.entries] for n in ("episodes", "score", "kl")), seconds)


class Log(lightning.Callback):
    """All metrics of each iteration."""

    def __init__(self) -> None:
        self.entries: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        self.entries.append({name: value.item() for name, value in trainer.callback_metrics.items()})


TRAINERS = {"TRL": train_trl, "lit_rlhf": train_ours}


def train_all(task: Task, seeds: list[int], iterations: int) -> dict[str, list[Curve]]:
    """The curves of each trainer, one a seed."""
    curves: dict[str, list[Curve]] = {name: [] for name in TRAINERS}
    for seed in seeds:
        for name, train in TRAINERS.items():
            curves[name].append(train(task, seed, iterations))
            print(f"trained with {name}, seed {seed}", flush=True)
    return curves


def table(curves: dict[str, list[Curve]], seeds: list[int]) -> str:
    """Markdown: where each training ended and how long it took."""
    header = f"| trainer | seed | score, last {ENDS} rollouts | KL, nats per answer | seconds of one core |"
    lines = [header, "|---|---|---|---|---|"]
    for name, runs in curves.items():
        for seed, run in zip(seeds, runs):
            score, kl = (torch.tensor(x[-ENDS:]).mean() for x in (run.score, run.kl))
            lines.append(f"| {name} | {seed} | {score:.2f} | {kl:.1f} | {run.seconds:.0f} |")
    return "\n".join(lines)


def plot(curves: dict[str, list[Curve]], path: Path) -> None:
    """Score and KL over episodes: a thin line a seed, a thick one for their mean."""
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "trl"  # the same file for the same curves
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, name, label in zip(axes, ("score", "kl"), ("mean score", "KL to the start, nats per answer")):
        for colour, (trainer, runs) in zip(("#d95f02", "#1b6ca8"), curves.items()):
            lines = torch.tensor([getattr(run, name) for run in runs])
            for line in lines:
                axis.plot(runs[0].episodes, line, color=colour, alpha=0.3, linewidth=0.8)
            axis.plot(runs[0].episodes, lines.mean(0), color=colour, linewidth=2, label=trainer)
        axis.set(xlabel="answers sampled", ylabel=label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
