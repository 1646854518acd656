from lit_rlhf.models import ReferenceUpdate
from lit_rlhf.stages.ppo.advantage import GAE, MonteCarlo
from lit_rlhf.stages.ppo.data import PPODataModule, WorldPPODataModule
from lit_rlhf.stages.ppo.health import HealthWatch, Limits, Unhealthy
from lit_rlhf.stages.ppo.kl import KLPenalty
from lit_rlhf.stages.ppo.loss import ClippedLoss, KLPenaltyLoss
from lit_rlhf.stages.ppo.module import PPOModule
from lit_rlhf.stages.ppo.scoring import Scoring

__all__ = [
    "GAE",
    "ClippedLoss",
    "HealthWatch",
    "KLPenalty",
    "KLPenaltyLoss",
    "Limits",
    "MonteCarlo",
    "PPODataModule",
    "PPOModule",
    "ReferenceUpdate",
    "Scoring",
    "Unhealthy",
    "WorldPPODataModule",
]
