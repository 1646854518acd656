"""A stage of ours as users run it: Lightning's trainer with what the pipeline gives it, and laps for the harness."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning
from harness import EndLap

from lit_rlhf.training import MetricsFile, adamw, make_trainer, warmup_decay
from lit_rlhf.training.diverging import StopOnNonFinite

LR, BETAS, CLIP = 1e-3, (0.9, 0.999), 1.0  # of both sides; betas as TRL and PyTorch have them
OPTIMIZER = partial(adamw, lr=LR, betas=BETAS)
FLOAT32, BF16 = "32-true", "bf16-mixed"
CONSTANT = partial(warmup_decay, shape="constant", warmup=0.0)


class Laps(lightning.Callback):
    """Ends a lap after each batch; ``amount(module, parts of the batch)`` gives its work and what is watched."""

    def __init__(self, end_lap: EndLap, amount: Callable[[Any, Any], dict[str, float]]) -> None:
        self.end_lap, self.amount = end_lap, amount

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, _: int) -> None:
        loss = {"loss": outputs["loss"].item()} if outputs else {}
        parts = [part.batch for part in batch] if isinstance(batch, list) else [batch]  # see lit_rlhf.training.parts
        self.end_lap(**loss, **self.amount(module, parts))


def fit(
    module: lightning.LightningModule,
    data: lightning.LightningDataModule,
    steps: int,
    end_lap: EndLap,
    amount: Callable[[Any, Any], dict[str, float]],
    **settings: Any,
) -> None:
    """``steps`` batches; checkpoints, validation and the progress bar are left out, as they are on the other side."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            limit_val_batches=1, logger=[MetricsFile(Path(folder) / "metrics.csv")],
            enable_progress_bar=False, callbacks=[StopOnNonFinite("benchmark"), Laps(end_lap, amount)],
            **{"accelerator": "cpu", "max_steps": steps, "gradient_clip_val": CLIP, **settings},
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
