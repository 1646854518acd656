from lit_rlhf.stages.functions import Annotator
from lit_rlhf.stages.preference.agreement import Agreement, agreement, majority
from lit_rlhf.stages.preference.annotators import CallableAnnotator, RewardModelAnnotator
from lit_rlhf.stages.preference.data import PreferenceDataModule, WorldPreferenceDataModule
from lit_rlhf.stages.preference.judge import LLMJudge
from lit_rlhf.stages.preference.module import PreferenceModule
from lit_rlhf.stages.preference.people import Labels, LabelStudio, People

__all__ = [
    "Agreement",
    "Annotator",
    "CallableAnnotator",
    "LLMJudge",
    "LabelStudio",
    "Labels",
    "People",
    "PreferenceDataModule",
    "PreferenceModule",
    "RewardModelAnnotator",
    "WorldPreferenceDataModule",
    "agreement",
    "majority",
]
