"""Reward model on rankings, and on answers that were rated alone."""

from lit_rlhf.stages.stage import Card, Panel, RoundFigure, Stage, accuracy_panel, exports, loss_panel, rate_panel

STAGE = Stage(
    name="reward",
    title="Reward model",
    order=50,
    module="lit_rlhf.stages.reward.module.RewardModule",
    data=("lit_rlhf.stages.reward.data.RewardDataModule", "lit_rlhf.stages.reward.data.WorldRewardDataModule"),
    objective="val_accuracy",
    models={"reward_model": "sft"},
    data_from="preference",
    in_pipeline=True,
    trains_on_prompts=True,
    learns_from=("rank", "rate"),
    per_round=(
        RoundFigure("Reward model, pairs right", "%", "val_accuracy"),
        RoundFigure("Reward model, gold pairs right", "%", "gold_accuracy"),
    ),
    panels=(
        loss_panel("reward", "nats per pair"),
        accuracy_panel("reward"),
        Panel("Margin, preferred \N{MINUS SIGN} other", "logits", {"reward/margin": "training"}),
        rate_panel("reward"),
    ),
    note="{val_accuracy:%} of pairs right",
    headline="The reward model ranks the preferred answer first in **{val_accuracy:%}** of the held-out pairs"
    "[; a bag of words does so in {bag_of_words_accuracy:%}].",
    cards=(
        Card("Reward model", "{gold_accuracy:%}", "of gold pairs ranked right"),
        Card("Reward model", "{val_accuracy:%}", "of held-out pairs ranked right"),
    ),
    in_sweeps=("val_accuracy", "bag_of_words_accuracy"),
)
__getattr__, __all__ = exports(STAGE)
