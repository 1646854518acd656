"""A trainer of TRL's as its users run it, with the settings of our side, and laps for the harness."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

from datasets import Dataset, disable_progress_bars
from harness import EndLap
from transformers import PrinterCallback, TrainerCallback
from users import CLIP, LR


def train(
    trainer_class: type,
    config_class: type,
    model: Any,
    tokenizer: Any,
    examples: list[dict[str, Any]],
    end_lap: EndLap,
    amount: Callable[[dict[str, Any]], dict[str, float]],
    bf16: bool = False,
    **settings: Any,
) -> None:
    """Train on ``examples`` in their order; ``amount(inputs)`` of a step gives its work and what is watched.

    Logging every 10 steps is TRL's default, as it is ours. Checkpointing of activations and bfloat16 (autocast), which
    TRL sets by default, are off unless asked for, as they are on our side."""
    disable_progress_bars()
    step: dict[str, float] = {}

    class Watched(trainer_class):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **others: Any) -> Any:
            step.update(amount(inputs))
            found = super().compute_loss(model, inputs, return_outputs, **others)
            step["loss"] = (found[0] if return_outputs else found).item()
            return found

    class Laps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            end_lap(**step)

    with tempfile.TemporaryDirectory() as folder:
        config = config_class(
            output_dir=folder, report_to="none", save_strategy="no", use_cpu=True, bf16=bf16, disable_tqdm=True,
            gradient_checkpointing=False, optim="adamw_torch_fused", learning_rate=LR, lr_scheduler_type="constant",
            weight_decay=0.0, max_grad_norm=CLIP, train_sampling_strategy="sequential", dataloader_pin_memory=False,
            **settings,
        )  # fmt: skip
        trainer = Watched(
            model, config, train_dataset=Dataset.from_list(examples), processing_class=tokenizer, callbacks=[Laps()]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
