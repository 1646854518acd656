from lit_rlhf.stages.evaluate.data import EvaluateDataModule, WorldEvaluateDataModule
from lit_rlhf.stages.evaluate.module import EvaluateModule

__all__ = ["EvaluateDataModule", "EvaluateModule", "WorldEvaluateDataModule"]
