"""Classification: discriminative fine-tuning with a linear head."""

from lit_rlhf.stages.stage import Panel, Stage, exports, loss_panel, rate_panel

STAGE = Stage(
    name="classify",
    title="Classification",
    order=20,
    module="lit_rlhf.stages.classify.module.ClassifyModule",
    data=("lit_rlhf.stages.classify.data.ClassifyDataModule", "lit_rlhf.stages.classify.data.WorldClassifyDataModule"),
    objective="accuracy",
    models={"policy": "pretrain"},
    panels=(
        loss_panel("classify", "nats per example"),
        Panel("Labelled right", "%", {"classify/accuracy": "training", "val/classify/accuracy": "held out"}),
        Panel("Auxiliary loss", "nats per token", {"classify/lm_loss": "training", "val/classify/lm_loss": "held out"}),
        rate_panel("classify"),
    ),
    note="{accuracy:%} right",
    glossary=(
        (
            "Loss of the classifier, nats per example",
            "\N{MINUS SIGN}log P(label | text). The auxiliary loss is the next-token loss on the same texts, added "
            "with a weight (\N{GREEK SMALL LETTER LAMDA}). F1 is the harmonic mean of precision and recall, averaged "
            "over the labels.",
        ),
    ),
    headline="The classifier solves **{accuracy:%}** of the held-out tasks; guessing solves {guessing:%}.",
)
__getattr__, __all__ = exports(STAGE)
