from lit_rlhf.stages.few_shot.data import FewShotDataModule, WorldFewShotDataModule
from lit_rlhf.stages.few_shot.module import FewShotModule

__all__ = ["FewShotDataModule", "FewShotModule", "WorldFewShotDataModule"]
