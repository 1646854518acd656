"""What the stages share around training: optimizer, schedule, batches, callbacks."""

from lit_rlhf.training.batches import seeded as seeded
from lit_rlhf.training.callbacks import FirstSteps as FirstSteps
from lit_rlhf.training.diverging import StopOnNonFinite as StopOnNonFinite
from lit_rlhf.training.fsdp import FSDP2 as FSDP2
from lit_rlhf.training.metrics_file import MetricsFile as MetricsFile, read_metrics as read_metrics
from lit_rlhf.training.notices import quiet as quiet
from lit_rlhf.training.optim import adamw as adamw, warmup_decay as warmup_decay
from lit_rlhf.training.trackio_logger import TrackioLogger as TrackioLogger
from lit_rlhf.training.trainer import make_trainer as make_trainer
from lit_rlhf.training.wandb_run import WandbRun as WandbRun
