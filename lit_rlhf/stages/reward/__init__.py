from lit_rlhf.stages.reward.data import RewardDataModule, WorldRewardDataModule
from lit_rlhf.stages.reward.module import RewardModule

__all__ = ["RewardDataModule", "RewardModule", "WorldRewardDataModule"]
