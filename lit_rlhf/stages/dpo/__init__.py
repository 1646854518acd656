"""Direct preference optimization on rankings."""

from lit_rlhf.stages.stage import Card, Panel, Stage, exports

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
        Panel("Loss", "nats a pair", {"dpo/loss": "training", "val/dpo/loss": "held out"}),
        Panel(
            "Pairs ranked right",
            "%",
            {"dpo/accuracy": "training", "val/dpo/accuracy": "held out", "val/dpo/gold_accuracy": "held out, by gold"},
            (0.5, "chance"),
        ),
        Panel("Margin, preferred \N{MINUS SIGN} other", "implicit reward", {"dpo/margin": "training"}),
        Panel(
            "Log-ratio to SFT",
            "nats an answer",
            {"dpo/chosen_log_ratio": "preferred", "dpo/rejected_log_ratio": "other"},
            (0.0, "as likely as at first"),
        ),
        Panel("Learning rate", "", {"dpo/lr": "schedule"}),
    ),
    model=("dpo", "DPO"),
    note="{val_accuracy:%} of pairs right",
    cards=(
        Card("DPO's implicit reward", "{gold_accuracy:%}", "of gold pairs ranked right"),
        Card("DPO's implicit reward", "{val_accuracy:%}", "of held-out pairs ranked right"),
    ),
)
__getattr__, __all__ = exports(__name__, module="DPOModule", data="DPODataModule WorldDPODataModule")
