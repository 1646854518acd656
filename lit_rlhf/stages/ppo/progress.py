"""Running figures of a PPO run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_rlhf.functional import WinRate
from lit_rlhf.stages.ppo.scoring import Scorer


class Progress(nn.Module):
    """Figures over the whole run; buffers, so that a resumed run goes on with its own."""

    episodes: Tensor  # responses of all processes
    unscored: Tensor  # of them, those that nobody has scored
    score_first: Tensor  # mean score of the first rollout that has one
    score_last: Tensor  # of the last
    entropy: Tensor  # nats per token, of the last rollout

    def __init__(self) -> None:
        super().__init__()
        for name in ("episodes", "unscored"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        for name in ("score_first", "score_last", "entropy"):
            self.register_buffer(name, torch.full((), math.nan))  # nothing yet

    def add(self, statistics: dict[str, Tensor], size: int) -> None:
        """Add a rollout of ``size`` responses."""
        if self.score_first.isnan():
            self.score_first.copy_(statistics["score"])
        if not statistics["score"].isnan():
            self.score_last.copy_(statistics["score"])
        self.entropy.copy_(statistics["entropy"])
        if "unscored" in statistics:
            self.unscored += (statistics["unscored"] * size).round().long()
        self.episodes += size


def means_over(updates: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What was watched in the optimizer steps of an iteration: means, and ratio and divergence before the first step.

    To be logged once per iteration: of a value that is logged in each step, Lightning would keep only the last."""
    means = {
        name: torch.stack([u[name] for u in updates if name in u]).mean() for name in updates[0] if name != "ratio"
    }
    return {**means, "first_ratio": updates[0]["ratio"], "first_kl": updates[0]["approx_kl"]}


def headline(
    metrics: Mapping[str, float], progress: Progress, wins: WinRate, scorer: Scorer, judge: str, kl_coef: float
) -> dict[str, Any]:
    """Figures of a finished run, from the ``metrics`` of its last validation; None where nothing was scored."""
    figures: dict[str, Any] = {
        "score_first": progress.score_first.item(),
        "score_last": progress.score_last.item(),
        "kl": metrics["val/ppo/kl"],
        "entropy": progress.entropy.item(),
        "episodes": int(progress.episodes),
        "val_score": metrics["val/ppo/score"],
        "val_sft_score": metrics["val/ppo/sft_score"],
        "val_sft_score_std": metrics["val/ppo/sft_score_std"],
        "gold": metrics.get("val/ppo/gold"),
        "correct": metrics.get("val/ppo/correct"),
        "kl_coef": kl_coef,
        "win_rate": {**wins._asdict(), "judge": judge} if wins.n else None,
        "scored_by": scorer.name,
        "score_unit": scorer.unit,
    }
    if progress.unscored:
        figures["unscored"] = int(progress.unscored)
    if "val/ppo/ptx_loss" in metrics:
        figures["ptx_loss"] = metrics["val/ppo/ptx_loss"]
    return {name: None if figure != figure else figure for name, figure in figures.items()}  # NaN
