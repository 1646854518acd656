"""Preference collection: several answers to each prompt, ranked by an annotator."""

from lit_rlhf.stages.stage import RoundFigure, Stage, exports

STAGE = Stage(
    name="preference",
    title="Preferences",
    order=40,
    module="lit_rlhf.stages.preference.module.PreferenceModule",
    data=(
        "lit_rlhf.stages.preference.data.PreferenceDataModule",
        "lit_rlhf.stages.preference.data.WorldPreferenceDataModule",
    ),
    objective="agreement",
    models={"policy": "sft"},
    in_pipeline=True,
    per_round=(RoundFigure("Rankings", "", "rankings"),),
    note="{rankings} rankings",
)
__getattr__, __all__ = exports(
    STAGE,
    annotator_agreement="Agreement agreement majority",
    annotators="Annotator CallableAnnotator RewardModelAnnotator",
    judge="LLMJudge",
    people="LabelStudio Labels People",
)
