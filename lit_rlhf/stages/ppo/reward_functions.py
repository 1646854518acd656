"""Reward functions that are ready to use, named in ``ppo.scoring.functions``."""

from __future__ import annotations

from functools import cache
from typing import Any

from lit_rlhf.errors import UserError
from lit_rlhf.text.records import Messages


@cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise UserError("the sentiment reward needs vaderSentiment: pip install 'lit_rlhf[sentiment]'") from None
    return SentimentIntensityAnalyzer()


def sentiment(prompts: list[Messages], responses: list[str], **record: Any) -> list[float]:
    """How positive each response is, from -1 to 1, by a list of rated words and some rules of English.

    The compound score of VADER (Hutto and Gilbert, 2014). A response without any of its words scores 0."""
    return [_analyzer().polarity_scores(response)["compound"] for response in responses]
