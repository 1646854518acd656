"""The labelling page: people rank, rate or write answers in their browser."""

from lit_rlhf.apps.label.page import LabellingPage
from lit_rlhf.apps.label.queue import Labelling
from lit_rlhf.apps.label.tasks import Item, Rank, Rate, Write

__all__ = ["Item", "Labelling", "LabellingPage", "Rank", "Rate", "Write"]
