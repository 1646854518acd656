"""Feedback records: ratings of single answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_rlhf.errors import UserError
from lit_rlhf.text.records.demonstrations import answered
from lit_rlhf.text.records.fields import number, require, short
from lit_rlhf.text.records.messages import Message, Messages, answer_turn, is_plain, text_of, tools_of
from lit_rlhf.text.records.rankings import Ranking, ranks_of
from lit_rlhf.text.records.split import prompt_key

_THUMBS = {"true": 1.0, "false": -1.0, "1": 1.0, "0": -1.0, "-1": -1.0, "1.0": 1.0, "0.0": -1.0, "-1.0": -1.0}


@dataclass(frozen=True)
class Feedback:
    """A rating of one answer: a thumb (1 or -1), or a number on a scale of their own."""

    prompt: Messages
    response: str
    rating: float
    annotator: str = ""
    lineage: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None  # functions that the assistant may call, for the chat template
    answer: Message | None = None  # the response as a message, where it has more than a text: calls, a thought
    place: str = field(default="", compare=False)  # file and line


def parse_feedback(row: dict[str, Any]) -> Feedback:
    """``prompt``, ``response`` (or ``completion``), and ``rating``: 1 or -1 for a thumb up or down, or a number.

    In its place ``label``, true or false (KTO), or ``helpfulness`` (HelpSteer), of whose aspects
    ``fields={rating: correctness}`` takes another."""
    if "rating" not in row and "label" in row:
        rating = _thumb(require(row, "label"))
    else:
        name = "helpfulness" if "rating" not in row and "helpfulness" in row else "rating"
        rating = number(require(row, name), name, "1 or -1 for a thumb up or down, or a number,")
    lineage: dict[str, Any] = {key: row[key] for key in ("model", "round", "sampling", "kind") if key in row}
    prompt, answer = answered(row)
    if prompt and len(answer) > 1:
        raise ValueError(
            f"{len(answer)} turns have one rating, and it is for one answer; put the others into the prompt"
        )
    *before, turn = answer
    whole = None if is_plain(turn) else turn
    annotator = str(row.get("annotator") or "")
    return Feedback([*prompt, *before], text_of(turn), rating, annotator, lineage, tools_of(row), whole)


def _thumb(label: Any) -> float:
    thumb = _THUMBS.get(str(label).strip().lower()) if isinstance(label, bool | int | float | str) else None
    if thumb is None:
        raise ValueError(f"'label' is {short(label)}; true or false was expected")
    return thumb


def rating_scale(feedback: Sequence[Feedback]) -> tuple[float, float]:
    """The (worst, best) rating: (0, 1) or (-1, 1) where they are between these, else the lowest and the highest."""
    low, high = min(f.rating for f in feedback), max(f.rating for f in feedback)
    return (low, high) if low < -1 or high > 1 else (0.0 if low >= 0 else -1.0, 1.0)


def rankings_of_feedback(feedback: Sequence[Feedback]) -> list[Ranking]:
    """A ranking for each prompt: answers that were rated higher rank higher, equal ratings tie.

    Ratings are measured on their :func:`rating_scale`. An answer that was rated several times counts with the mean.
    Raises ``UserError`` where all ratings are equal, but thumbs."""
    low, high = rating_scale(feedback)
    if low == high:
        alike = "nothing can be learned from answers that are all alike"
        raise UserError(f"all {len(feedback)} ratings are {low:g}; {alike}")
    prompts: dict[str, list[Feedback]] = {}
    for item in feedback:
        prompts.setdefault(prompt_key(item.prompt), []).append(item)
    return [_rated(items, low, high) for items in prompts.values()]


def _rated(items: list[Feedback], low: float, high: float) -> Ranking:
    by_answer: dict[str, tuple[Message, list[float]]] = {}
    for item in items:
        turn = item.answer or answer_turn(item.response)
        key = json.dumps(turn, sort_keys=True, default=str)
        by_answer.setdefault(key, (turn, []))[1].append((item.rating - low) / (high - low))
    turns = [turn for turn, _ in by_answer.values()]
    ratings = [sum(values) / len(values) for _, values in by_answer.values()]
    annotators = sorted({item.annotator for item in items})
    first = items[0]
    return Ranking(
        first.prompt, [*map(text_of, turns)], ranks_of(ratings), "+".join(annotators), first.lineage, ratings,
        tools=first.tools, answers=None if all(map(is_plain, turns)) else turns, place=first.place,
    )  # fmt: skip
