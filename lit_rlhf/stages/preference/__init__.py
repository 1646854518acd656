from lit_rlhf.stages.preference.data import PreferenceDataModule, WorldPreferenceDataModule
from lit_rlhf.stages.preference.module import PreferenceModule

__all__ = ["PreferenceDataModule", "PreferenceModule", "WorldPreferenceDataModule"]
