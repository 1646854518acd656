"""Modules of stages that note what each iteration takes; ``benchmarks/gpu.py`` names them in a command."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from lit_rlhf.stages import PPOModule, RewardModule, SFTModule

FILE = "LIT_RLHF_LAPS"  # environment: where to write, a line per iteration


def now(device: str) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Timed:
    """Notes seconds and tokens of each iteration."""

    stage: str
    device: torch.device

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.begun = now(self.device.type)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        lap = {"stage": self.stage, "seconds": now(self.device.type) - self.begun, "tokens": self.tokens_of(batch)}
        with Path(os.environ[FILE]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(lap) + "\n")

    def tokens_of(self, batch: Any) -> int:
        """Those that the iteration learned from; of PPO prompts and responses, once for all epochs."""
        parts = [part.batch for part in batch] if isinstance(batch, list) else [batch]
        return sum(int(part.packed.lengths.sum()) for part in parts)


class TimedSFT(Timed, SFTModule):
    pass


class TimedReward(Timed, RewardModule):
    pass


class TimedPPO(Timed, PPOModule):
    stage = "ppo"

    def collect(self, *arguments: Any) -> Any:
        self.rollout, statistics = super().collect(*arguments)
        return self.rollout, statistics

    def tokens_of(self, batch: Any) -> int:
        return sum(map(len, self.rollout.sequences))
