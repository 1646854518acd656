"""Evaluation: several models answer the same held-out prompts."""

from lit_rlhf.stages.stage import GRADES, RoundFigure, Stage, exports

STAGE = Stage(
    name="evaluate",
    title="Evaluation",
    order=80,
    module="lit_rlhf.stages.evaluate.module.EvaluateModule",
    data=("lit_rlhf.stages.evaluate.data.EvaluateDataModule", "lit_rlhf.stages.evaluate.data.WorldEvaluateDataModule"),
    objective="win_rate.{policy}_vs_sft.mean",
    models={
        "policies.base": "pretrain",
        "policies.sft": "sft",
        "policies.ppo": "ppo",
        "policies.dpo": "dpo",
        "reward_model": "reward",
    },
    at_least="policies.sft",
    in_pipeline=True,
    per_round=(
        RoundFigure("Wins against SFT", "%", "win_rate.ppo_vs_sft.mean"),
        RoundFigure("KL to SFT", "nats", "models.ppo.kl"),
        RoundFigure("Gold grade", "points", "models.ppo.gold"),
        RoundFigure("Correctness", GRADES, "models.ppo.correct"),
    ),
    own_section=True,
    note="{prompts} prompts",
)
__getattr__, __all__ = exports(STAGE)
