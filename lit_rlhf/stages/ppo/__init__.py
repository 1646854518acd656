from lit_rlhf.stages.ppo.data import PPODataModule, WorldPPODataModule
from lit_rlhf.stages.ppo.module import PPOModule

__all__ = ["PPODataModule", "PPOModule", "WorldPPODataModule"]
