from lit_rlhf.stages.sft.data import SFTDataModule, WorldSFTDataModule
from lit_rlhf.stages.sft.module import SFTModule

__all__ = ["SFTDataModule", "SFTModule", "WorldSFTDataModule"]
