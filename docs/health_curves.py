"""The curves of docs/reading_a_ppo_run.md: makes the runs, one healthy and some sick, and draws them side by side.

    PYTHONPATH=docs python docs/health_curves.py quickstart --runs runs

with ``quickstart`` a finished run of seed 1. A run that is there is not made again; all of them take a quarter of an
hour on one core."""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.pyplot as plt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.rollouts import FastEngine
from lit_rlhf.text.world import World
from lit_rlhf.training import read_metrics

HERE = Path(__file__).parent
ITERATIONS = 30


def words(prompts: list[Any], responses: list[str], **record: Any) -> list[float]:
    """A reward that loves length: a tenth of a point a word."""
    return [len(response.split()) / 10 for response in responses]


def extremes(prompts: list[Any], responses: list[str], **record: Any) -> list[float]:
    """A reward without bounds: it doubles with every "the"."""
    return [2.0 ** response.split().count("the") for response in responses]


def correct(prompts: list[Any], responses: list[str], finished: list[bool], **record: Any) -> list[float]:
    """A reward that can be verified: what the world of seed 1 knows to be true."""
    world = World(1)
    return [float(world.grade(p, r, not f).correct) for p, r, f in zip(prompts, responses, finished)]


class StaleEngine(FastEngine):
    """Samples with the weights of the first hand-over for ever, and believes that they are new."""

    def sync(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
        self.first = getattr(self, "first", None) or copy.deepcopy(policy)
        return super().sync(self.first, tokenizer)


class StaleEngineOtherLogprobs(StaleEngine):
    """The same, and PPO works out the policy's log-probs of these answers."""

    exact = False


FREE = ["ppo.module.kl_coef=0"]  # nothing holds the policy near the SFT model
LENGTH = ["ppo.scoring.reward_model_weight=0", "ppo.scoring.functions=[health_curves.words]"]
CORRECT = ["ppo.scoring.reward_model_weight=0", "ppo.scoring.functions=health_curves.correct"]
RUNS = {  # name -> settings
    "healthy": [],
    "greedy": [*FREE, "ppo.optimizer.lr=3e-3"],
    "long": [*FREE, *LENGTH, "ppo.scoring.missing_eos_penalty=0", "ppo.optimizer.lr=1e-3"],
    "extreme": [*FREE, "ppo.scoring.functions=[health_curves.extremes]", "ppo.optimizer.lr=1e-3"],
    "critic": ["ppo.module.critic_lr=1.0", "ppo.module.value_clip_range=null"],
    "stale_logprobs": ["engine._target_=health_curves.StaleEngine"],
    "stale_weights": ["engine._target_=health_curves.StaleEngineOtherLogprobs"],
    "eight_prompts": [*FREE, "ppo.data.limit=8", "ppo.optimizer.lr=1e-3"],
    "two_prompts": [*FREE, "ppo.data.limit=2", "ppo.optimizer.lr=1e-3"],
    "by_heart": [*FREE, *CORRECT, "ppo.data.limit=2", "ppo.optimizer.lr=1e-3"],
}


class Panel(NamedTuple):
    """Healthy and sick, side by side."""

    metric: str
    unit: str
    sick: str  # a run
    beside: str = ""  # another metric of both


PANELS = {  # check -> what shows it
    "first_step": Panel("ppo/first_ratio", "ratio, largest", "stale_logprobs"),
    "large_steps": Panel("ppo/approx_kl", "nats per token", "greedy"),
    "negative_kl": Panel("ppo/kl", "nats per answer", "stale_weights"),
    "entropy_collapse": Panel("ppo/entropy", "nats per token", "two_prompts"),
    "growing_answers": Panel("ppo/response_length", "tokens", "long"),
    "unfinished_answers": Panel("ppo/finished", "share of answers", "long"),
    "poor_critic": Panel("ppo/explained_variance", "", "critic"),
    "score_spread": Panel("ppo/score_std", "reward units", "extreme"),
    "advantage_spread": Panel("ppo/advantage_std", "reward units", "critic"),
    "worse_held_out": Panel("val/ppo/score", "reward units", "by_heart", "ppo/score"),
    "over_optimization": Panel("ppo/gold", "points; reward units", "eight_prompts", "ppo/score"),
}


def make(name: str, start: str, runs: str) -> Path:
    """The folder of a run's PPO, made where it is not there."""
    command = [
        sys.executable, "-m", "lit_rlhf", "stage=ppo", f"from_run={start}", f"run=health_{name}", f"paths.runs={runs}",
        "logger=csv", "threads=1", f"ppo.trainer.limit_train_batches={ITERATIONS}", "ppo.trainer.val_check_interval=3",
        "ppo.module.val_samples=1", *RUNS[name],
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return Path(runs, f"health_{name}", "ppo")


def line(folder: Path, metric: str) -> tuple[list[int], list[float]]:
    """(iterations, values) of a metric."""
    rows = read_metrics(folder / "metrics.csv")
    points = [(step + 1, row[metric]) for step, row in rows.items() if metric in row and step < ITERATIONS]
    return [step for step, _ in points], [value for _, value in points]


def draw(check: str, panel: Panel, folders: dict[str, Path], begin: int | None) -> None:
    """Healthy on the left, sick on the right, where a line marks the iteration in which the check began to speak."""
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 1.9), layout="constrained", sharex=True)
    for ax, run, colour in ((axes[0], "healthy", "#2b8a8a"), (axes[1], panel.sick, "#c2410c")):
        ax.plot(*line(folders[run], panel.metric), color=colour, marker="." if "val/" in panel.metric else "")
        if panel.beside:
            ax.plot(*line(folders[run], panel.beside), color="#858d97", ls="--", label=panel.beside)
            ax.legend(frameon=False)
        ax.set_title(f"{panel.metric}, run {run}", loc="left", fontsize=9)
        ax.set_xlabel("iteration")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(panel.unit)
    if begin is not None:
        axes[1].axvline(begin, color="#1f2328", lw=0.8, ls=":")
    figure.savefig(HERE / "health" / f"{check}.svg", metadata={"Date": None})
    plt.close(figure)


def found(folder: Path) -> dict[str, dict[str, Any]]:
    """check -> its line in health.jsonl."""
    rows = [json.loads(row) for row in (folder / "health.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["check"]: row for row in rows}


def main() -> None:
    """Make what is not there, draw, and print what the watch said."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("start", help="a finished run")
    parser.add_argument("--runs", default="runs", help="the folder of runs")
    arguments = parser.parse_args()
    folders = {name: make(name, arguments.start, arguments.runs) for name in RUNS}
    matplotlib.rcParams.update({"font.size": 8, "svg.hashsalt": "health"})
    (HERE / "health").mkdir(exist_ok=True)
    for check, panel in PANELS.items():
        row = found(folders[panel.sick]).get(check, {})
        draw(check, panel, folders, row.get("step"))
        print(f"{check}, run {panel.sick}, iteration {row.get('step')}: {row.get('finding')}")
    for name, folder in folders.items():
        said = ", ".join(f"{check} ({row['step']})" for check, row in found(folder).items())
        print(f"run {name}: {said or 'no findings'}")


if __name__ == "__main__":
    main()
