"""What the stages share around training: optimizer, schedule, batches, callbacks."""

from lit_rlhf.training.batches import BatchLoader, ExampleDataModule, in_order, seeded, sharding, shuffled
from lit_rlhf.training.callbacks import (
    BestCheckpoint,
    FirstSteps,
    LastCheckpoint,
    RandomState,
    StageProgressBar,
    StopOnNonFinite,
    TextSamples,
    append_rows,
    inner_bar,
    said_when_slow,
)
from lit_rlhf.training.dry_run import Meter, largest
from lit_rlhf.training.memory import Peak, machine_bytes, resident_bytes
from lit_rlhf.training.metrics_file import MetricsFile, read_metrics
from lit_rlhf.training.notices import quiet
from lit_rlhf.training.optim import OptimizerFactory, Schedule, adamw, decay_groups, warmup_decay
from lit_rlhf.training.parts import Part
from lit_rlhf.training.step_log import StepLog
from lit_rlhf.training.trained_models import ModelSettings
from lit_rlhf.training.trained_state import TrainedState
from lit_rlhf.training.trainer import make_trainer

__all__ = [
    "BatchLoader",
    "BestCheckpoint",
    "ExampleDataModule",
    "FirstSteps",
    "LastCheckpoint",
    "Meter",
    "MetricsFile",
    "ModelSettings",
    "OptimizerFactory",
    "Part",
    "Peak",
    "RandomState",
    "Schedule",
    "StageProgressBar",
    "StepLog",
    "StopOnNonFinite",
    "TextSamples",
    "TrainedState",
    "adamw",
    "append_rows",
    "decay_groups",
    "in_order",
    "inner_bar",
    "largest",
    "machine_bytes",
    "make_trainer",
    "quiet",
    "read_metrics",
    "resident_bytes",
    "said_when_slow",
    "seeded",
    "sharding",
    "shuffled",
    "warmup_decay",
]
