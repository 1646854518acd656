"""Supervised fine-tuning on demonstrations."""

from lit_rlhf.stages.stage import Card, Panel, Stage, exports

STAGE = Stage(
    name="sft",
    title="Supervised fine-tuning",
    order=30,
    module="lit_rlhf.stages.sft.module.SFTModule",
    data=("lit_rlhf.stages.sft.data.SFTDataModule", "lit_rlhf.stages.sft.data.WorldSFTDataModule"),
    objective="val_loss",
    models={"policy": "pretrain"},
    in_pipeline=True,
    trains_on_prompts=True,
    skipped_for_checkpoint=True,
    learns_from=("write",),
    panels=(
        Panel("Loss", "nats a response token", {"sft/loss": "training", "val/sft/loss": "held out"}),
        Panel("Learning rate", "", {"sft/lr": "schedule"}),
    ),
    model=("sft", "SFT"),
    note="loss {val_loss:change}",
    headline="Supervised fine-tuning ended at a held-out loss of **{val_loss}** nats an answer's token"
    "[, from {val_loss_first} at first].",
    cards=(Card("SFT loss", "{val_loss:change}", "nats a token, held out"),),
)
__getattr__, __all__ = exports(__name__, module="SFTModule", data="SFTDataModule WorldSFTDataModule")
