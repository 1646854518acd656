"""Classification: discriminative fine-tuning with a linear head."""

from lit_rlhf.stages.stage import Panel, Stage, exports

STAGE = Stage(
    name="classify",
    title="Classification",
    order=20,
    module="lit_rlhf.stages.classify.module.ClassifyModule",
    data=("lit_rlhf.stages.classify.data.ClassifyDataModule", "lit_rlhf.stages.classify.data.WorldClassifyDataModule"),
    objective="accuracy",
    models={"policy": "pretrain"},
    panels=(
        Panel("Loss", "nats an example", {"classify/loss": "training", "val/classify/loss": "held out"}),
        Panel("Labelled right", "%", {"classify/accuracy": "training", "val/classify/accuracy": "held out"}),
        Panel("Auxiliary loss", "nats a token", {"classify/lm_loss": "training", "val/classify/lm_loss": "held out"}),
        Panel("Learning rate", "", {"classify/lr": "schedule"}),
    ),
    note="{accuracy:%} right",
    headline="The classifier solves **{accuracy:%}** of the held-out tasks; guessing solves {guessing:%}.",
)
__getattr__, __all__ = exports(
    __name__, module="ClassifyModule", data="ClassifyDataModule WorldClassifyDataModule"
)  # fmt: skip
