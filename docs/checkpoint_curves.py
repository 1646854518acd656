"""The curves of docs/checkpoints.md, drawn from finished runs.

    python docs/checkpoint_curves.py --runs runs

Reads ``sentiment_{gae,rloo,grpo}_{0,1,2}``, made by the commands on that page; a run that is not there is left out."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from lit_rlhf.training import read_metrics

HERE = Path(__file__).parent
ADVANTAGES = {"gae": ("PPO with a critic", "#2b8a8a"), "rloo": ("RLOO", "#c2410c"), "grpo": ("GRPO", "#6d4bb3")}
SEEDS = (0, 1, 2)


def points(folder: Path, x: str | None, y: str) -> tuple[list[float], list[float]]:
    """Values of two metrics of one stage, from the steps that have both; ``x`` None: the step."""
    rows = read_metrics(folder / "metrics.csv")
    found = [(step if x is None else row[x], row[y]) for step, row in rows.items() if y in row]
    return [there for there, _ in found], [value for _, value in found]


def axis(ax: Axes, title: str, x: str) -> None:
    ax.set_title(title, fontsize=9, loc="left")
    ax.set_xlabel(x, fontsize=8)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def draw_sentiment(runs: Path) -> None:
    """Score of the rollouts, by iteration and by divergence; a line per seed."""
    figure, (by_time, by_kl) = plt.subplots(1, 2, figsize=(7.2, 2.6), layout="constrained", sharey=True)
    for name, (label, colour) in ADVANTAGES.items():
        folders = [runs / f"sentiment_{name}_{seed}" / "ppo" for seed in SEEDS]
        for i, folder in enumerate(filter(Path.is_dir, folders)):
            label = None if i else label
            by_time.plot(*points(folder, None, "ppo/score"), color=colour, lw=1.1, alpha=0.8, label=label)
            there = points(folder, "ppo/kl", "ppo/score")
            by_kl.plot(*([x[1:] for x in there]), color=colour, marker=".", ms=4, lw=0, alpha=0.7, label=label)
    axis(by_time, "Sentiment of the rollouts, 1 at most", "iteration of 64 answers")
    axis(by_kl, "the same", "KL to the checkpoint, nats per answer")
    by_kl.legend(fontsize=8, frameon=False)
    figure.savefig(HERE / "checkpoints_sentiment.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    runs = parser.parse_args().runs
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "lit_rlhf"}  # small files, the same in each run
    draw_sentiment(runs)


if __name__ == "__main__":
    main()
