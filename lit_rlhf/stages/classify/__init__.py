from lit_rlhf.stages.classify.data import ClassifyDataModule, WorldClassifyDataModule
from lit_rlhf.stages.classify.module import ClassifyModule

__all__ = ["ClassifyDataModule", "ClassifyModule", "WorldClassifyDataModule"]
