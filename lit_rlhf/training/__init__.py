"""What the stages share around training: optimizer, schedule, batches, callbacks."""

from lit_rlhf.training.batches import (
    BatchLoader as BatchLoader,
    in_order as in_order,
    seeded as seeded,
    sharding as sharding,
    shuffled as shuffled,
)
from lit_rlhf.training.callbacks import (
    BestCheckpoint as BestCheckpoint,
    FirstSteps as FirstSteps,
    LastCheckpoint as LastCheckpoint,
    RandomState as RandomState,
    StageProgressBar as StageProgressBar,
    StopOnNonFinite as StopOnNonFinite,
    TextSamples as TextSamples,
    inner_bar as inner_bar,
    said_when_slow as said_when_slow,
)
from lit_rlhf.training.dry_run import Meter as Meter, largest as largest
from lit_rlhf.training.memory import Peak as Peak, machine_bytes as machine_bytes, resident_bytes as resident_bytes
from lit_rlhf.training.metrics_file import (
    MetricsFile as MetricsFile,
    append_rows as append_rows,
    read_metrics as read_metrics,
)
from lit_rlhf.training.notices import quiet as quiet
from lit_rlhf.training.optim import (
    OptimizerFactory as OptimizerFactory,
    Schedule as Schedule,
    adamw as adamw,
    decay_groups as decay_groups,
    warmup_decay as warmup_decay,
)
from lit_rlhf.training.parts import LearnsInParts as LearnsInParts, Part as Part
from lit_rlhf.training.trained_models import ModelSettings as ModelSettings
from lit_rlhf.training.trained_state import TrainedState as TrainedState
from lit_rlhf.training.trainer import make_trainer as make_trainer
