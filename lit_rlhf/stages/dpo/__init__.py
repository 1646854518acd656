"""Direct preference optimization on rankings."""

from lit_rlhf.stages.stage import Card, Model, Panel, Stage, accuracy_panel, exports, loss_panel, rate_panel

STAGE = Stage(
    name="dpo",
    title="DPO",
    order=70,
    module="lit_rlhf.stages.dpo.module.DPOModule",
    data=("lit_rlhf.stages.dpo.data.DPODataModule", "lit_rlhf.stages.dpo.data.WorldDPODataModule"),
    objective="val_accuracy",
    models={"policy": "sft"},
    data_from="preference",
    aligns=True,
    trains_on_prompts=True,
    panels=(
        loss_panel("dpo", "nats per pair"),
        accuracy_panel("dpo"),
        Panel("Margin, preferred \N{MINUS SIGN} other", "implicit reward", {"dpo/margin": "training"}),
        Panel(
            "Log-ratio to SFT",
            "nats per answer",
            {"dpo/chosen_log_ratio": "preferred", "dpo/rejected_log_ratio": "other"},
            (0.0, "as likely as at first"),
        ),
        rate_panel("dpo"),
    ),
    model=Model("dpo", "DPO", "green"),
    note="{val_accuracy:%} of pairs right",
    glossary=(
        (
            "Loss of DPO, nats per pair",
            "That of a reward model, of DPO's implicit reward: \N{GREEK SMALL LETTER BETA} log(P(answer) / P(answer by "
            "SFT)).",
        ),
    ),
    cards=(
        Card("DPO's implicit reward", "{gold_accuracy:%}", "of gold pairs ranked right"),
        Card("DPO's implicit reward", "{val_accuracy:%}", "of held-out pairs ranked right"),
    ),
)
__getattr__, __all__ = exports(STAGE)
