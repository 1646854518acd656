"""Feedback records: ratings of single answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_rlhf.errors import UserError
from lit_rlhf.text.records.demonstrations import answered
from lit_rlhf.text.records.fields import number, require, short
from lit_rlhf.text.records.messages import Messages, tools_of, transcript_tail
from lit_rlhf.text.records.rankings import Ranking, ranks_of
from lit_rlhf.text.records.split import prompt_key

_THUMBS = {"true": 1.0, "false": -1.0, "1": 1.0, "0": -1.0, "-1": -1.0}


@dataclass(frozen=True)
class Feedback:
    """A rating of one answer: a thumb (1 or -1), or a number on a scale of their own."""

    prompt: Messages
    response: str
    rating: float
    annotator: str = ""
    lineage: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None  # functions that the assistant may call, for the chat template
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
    prompt, answer = (prompt, answer) if prompt else (answer[:-1], answer[-1:])
    return Feedback(prompt, transcript_tail(answer), rating, str(row.get("annotator", "")), lineage, tools_of(row))


def _thumb(label: Any) -> float:
    thumb = _THUMBS.get(str(label).strip().lower()) if isinstance(label, bool | int | float | str) else None
    if thumb is None:
        raise ValueError(f"'label' is {short(label)}; true or false was expected")
    return thumb


def rankings_of_feedback(feedback: Sequence[Feedback]) -> list[Ranking]:
    """A ranking for each prompt: answers that were rated higher rank higher, equal ratings tie.

    Ratings between -1 and 1 are thumbs; others are measured between the lowest and the highest of them all. An answer
    that was rated several times counts with the mean. Raises ``UserError`` where all ratings are equal, but thumbs."""
    given = [f.rating for f in feedback]
    thumbs = all(-1 <= rating <= 1 for rating in given)
    low, high = (-1.0, 1.0) if thumbs else (min(given), max(given))
    if low == high:
        raise UserError(f"all {len(given)} ratings are {low:g}; nothing can be learned from answers that are all alike")
    prompts: dict[str, list[Feedback]] = {}
    for item in feedback:
        prompts.setdefault(prompt_key(item.prompt), []).append(item)
    return [_rated(items, low, high) for items in prompts.values()]


def _rated(items: list[Feedback], low: float, high: float) -> Ranking:
    by_answer: dict[str, list[float]] = {}
    for item in items:
        by_answer.setdefault(item.response, []).append((item.rating - low) / (high - low))
    ratings = [sum(values) / len(values) for values in by_answer.values()]
    annotators = sorted({item.annotator for item in items})
    first = items[0]
    return Ranking(
        first.prompt, list(by_answer), ranks_of(ratings), "+".join(annotators), first.lineage, ratings,
        tools=first.tools, place=first.place,
    )  # fmt: skip
