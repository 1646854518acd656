"""Next-token pretraining."""

from lit_rlhf.stages.stage import Card, Model, Panel, Stage, exports, loss_panel, rate_panel

STAGE = Stage(
    name="pretrain",
    title="Pretraining",
    order=10,
    module="lit_rlhf.stages.pretrain.module.PretrainModule",
    data=(
        "lit_rlhf.stages.pretrain.data.PretrainDataModule",
        "lit_rlhf.stages.pretrain.data.WorldPretrainDataModule",
        "lit_rlhf.stages.pretrain.stream.StreamPretrainDataModule",
    ),
    objective="val_loss",
    in_pipeline=True,
    replaced_by_checkpoint=True,
    panels=(
        loss_panel("pretrain", "nats per token"),
        Panel("Loss on the old text", "nats per token", {"val/pretrain/old_loss": "watched, not trained on"}),
        rate_panel("pretrain"),
    ),
    model=Model("base", "Base"),
    note="loss {val_loss:change}",
    headline="Pretraining ended at a held-out loss of **{val_loss}** nats per token[, from {val_loss_first} at first].",
    cards=(Card("Pretraining loss", "{val_loss:change}", "nats per token, held out"),),
)
__getattr__, __all__ = exports(STAGE)
