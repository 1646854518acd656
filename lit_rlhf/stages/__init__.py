"""The stages: each a LightningModule with its LightningDataModule."""

from lit_rlhf.stages.classify import ClassifyDataModule, ClassifyModule, WorldClassifyDataModule
from lit_rlhf.stages.dpo import DPODataModule, DPOModule, WorldDPODataModule
from lit_rlhf.stages.evaluate import EvaluateDataModule, EvaluateModule, WorldEvaluateDataModule
from lit_rlhf.stages.few_shot import FewShotDataModule, FewShotModule, WorldFewShotDataModule
from lit_rlhf.stages.ppo import PPODataModule, PPOModule, WorldPPODataModule
from lit_rlhf.stages.preference import PreferenceDataModule, PreferenceModule, WorldPreferenceDataModule
from lit_rlhf.stages.pretrain import PretrainDataModule, PretrainModule, WorldPretrainDataModule
from lit_rlhf.stages.reward import RewardDataModule, RewardModule, WorldRewardDataModule
from lit_rlhf.stages.sft import SFTDataModule, SFTModule, WorldSFTDataModule

__all__ = [
    "ClassifyDataModule",
    "ClassifyModule",
    "DPODataModule",
    "DPOModule",
    "EvaluateDataModule",
    "EvaluateModule",
    "FewShotDataModule",
    "FewShotModule",
    "PPODataModule",
    "PPOModule",
    "PreferenceDataModule",
    "PreferenceModule",
    "PretrainDataModule",
    "PretrainModule",
    "RewardDataModule",
    "RewardModule",
    "SFTDataModule",
    "SFTModule",
    "WorldClassifyDataModule",
    "WorldDPODataModule",
    "WorldEvaluateDataModule",
    "WorldFewShotDataModule",
    "WorldPPODataModule",
    "WorldPreferenceDataModule",
    "WorldPretrainDataModule",
    "WorldRewardDataModule",
    "WorldSFTDataModule",
]
