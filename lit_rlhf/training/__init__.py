"""What the stages share around training: optimizer, schedule, batches, callbacks."""

from lit_rlhf.training.batches import BatchLoader, ExampleDataModule, in_order, seeded, sharding, shuffled
from lit_rlhf.training.callbacks import (
    BestCheckpoint,
    Interrupted,
    LastCheckpoint,
    RandomState,
    StageProgressBar,
    StopOnNonFinite,
    TextSamples,
    append_rows,
)
from lit_rlhf.training.metrics_file import MetricsFile, read_metrics
from lit_rlhf.training.optim import OptimizerFactory, Schedule, adamw, decay_groups, warmup_decay
from lit_rlhf.training.trained_models import ModelSettings
from lit_rlhf.training.trainer import make_trainer

__all__ = [
    "BatchLoader",
    "BestCheckpoint",
    "ExampleDataModule",
    "Interrupted",
    "LastCheckpoint",
    "MetricsFile",
    "ModelSettings",
    "OptimizerFactory",
    "RandomState",
    "Schedule",
    "StageProgressBar",
    "StopOnNonFinite",
    "TextSamples",
    "adamw",
    "append_rows",
    "decay_groups",
    "in_order",
    "make_trainer",
    "read_metrics",
    "seeded",
    "sharding",
    "shuffled",
    "warmup_decay",
]
