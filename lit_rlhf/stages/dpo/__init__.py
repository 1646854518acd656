from lit_rlhf.stages.dpo.data import DPODataModule, WorldDPODataModule
from lit_rlhf.stages.dpo.module import DPOModule

__all__ = ["DPODataModule", "DPOModule", "WorldDPODataModule"]
