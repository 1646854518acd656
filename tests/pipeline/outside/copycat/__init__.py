"""A stage from outside the package: it goes on from the SFT model and learns lines of text by heart."""

from pathlib import Path

from lit_rlhf.stages.stage import Card, Model, Panel, Stage

STAGE = Stage(
    name="copycat",
    title="Learning by heart",
    order=35,  # behind SFT, before preference
    module="copycat.stage.CopycatModule",
    data=("copycat.stage.LinesDataModule",),
    objective="val_loss",
    models={"policy": "sft"},
    trains_on_prompts=True,
    settings=Path(__file__).parent / "conf",
    panels=(Panel("Surprise", "nats per token", {"copycat/loss": "training", "val/copycat/loss": "held out"}),),
    model=Model("copycat", "Copycat", "violet"),
    note="surprise {val_loss:change}",
    cards=(Card("Copycat's surprise", "{val_loss:change}", "nats per token"),),
)
