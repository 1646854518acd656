"""Few-shot evaluation: tasks by prompt alone."""

from lit_rlhf.stages.stage import Stage, exports

STAGE = Stage(
    name="few_shot",
    title="Few-shot",
    order=90,
    module="lit_rlhf.stages.few_shot.module.FewShotModule",
    data=("lit_rlhf.stages.few_shot.data.FewShotDataModule", "lit_rlhf.stages.few_shot.data.WorldFewShotDataModule"),
    objective="accuracy",
    models={"policy": "pretrain"},
    own_section=True,
    glossary=(
        (
            "sum, token, byte",
            "A choice is told by the log-probability of its tokens: their sum, or that divided by its tokens or bytes.",
        ),
    ),
    note="{accuracy:%} right",
    headline="By prompt alone, the model solves **{accuracy:%}** of the held-out tasks; guessing solves {guessing:%}.",
)
__getattr__, __all__ = exports(STAGE)
