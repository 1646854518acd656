"""The labelling page: people rank, rate or write answers in their browser."""

from lit_rlhf.apps.label.modes import Item, Rank, Rate, Write
from lit_rlhf.apps.label.page import LabellingPage
from lit_rlhf.apps.label.queue import Labelling

__all__ = ["Item", "Labelling", "LabellingPage", "Rank", "Rate", "Write"]
