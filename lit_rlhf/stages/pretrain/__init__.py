from lit_rlhf.stages.pretrain.data import PretrainDataModule, WorldPretrainDataModule
from lit_rlhf.stages.pretrain.module import PretrainModule

__all__ = ["PretrainDataModule", "PretrainModule", "WorldPretrainDataModule"]
