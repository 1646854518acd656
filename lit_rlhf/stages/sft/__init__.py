"""Supervised fine-tuning on demonstrations."""

from lit_rlhf.stages.stage import Card, Model, Stage, exports, loss_panel, rate_panel

STAGE = Stage(
    name="sft",
    title="Supervised fine-tuning",
    order=30,
    module="lit_rlhf.stages.sft.module.SFTModule",
    data=(
        "lit_rlhf.stages.sft.data.SFTDataModule",
        "lit_rlhf.stages.sft.data.WorldSFTDataModule",
        "lit_rlhf.stages.sft.stream.StreamSFTDataModule",
    ),
    objective="val_loss",
    models={"policy": "pretrain"},
    in_pipeline=True,
    trains_on_prompts=True,
    skipped_for_checkpoint=True,
    learns_from=("write",),
    panels=(loss_panel("sft", "nats per response token"), rate_panel("sft")),
    model=Model("sft", "SFT", "blue"),
    note="loss {val_loss:change}",
    headline="Supervised fine-tuning ended at a held-out loss of **{val_loss}** nats per response token"
    "[, from {val_loss_first} at first].",
    cards=(Card("SFT loss", "{val_loss:change}", "nats per token, held out"),),
)
__getattr__, __all__ = exports(STAGE)
