"""Samples of the models: answers side by side, and how texts changed through training."""

# ruff: noqa: RUF001  minus signs, dashes and the multiplication sign are meant

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

from lit_rlhf.apps.display import model_name, number
from lit_rlhf.text.records import text_of

ANSWERS_SHOWN = 12  # prompts side by side
STEPS_SHOWN = 6  # of the samples through training
TEXT_SHOWN = 1200  # characters of a text


class Answer(NamedTuple):
    """An answer with its (CSS class, label) badges."""

    text: str
    badges: list[tuple[str, str]]


class Column(NamedTuple):
    """One model's answer to one prompt."""

    model: str
    name: str
    first: Answer
    others: list[tuple[str, Answer]]  # how it was drawn


class Row(NamedTuple):
    """A prompt and the models' answers."""

    kind: str
    dialogue: list[tuple[str, str]]  # role, text
    outcome: str  # of our first sample against theirs: "better", "worse", "same" or ""
    columns: list[Column]


class AnswerTable(NamedTuple):
    """The prompts shown, and how the first samples of all prompts compare."""

    rows: list[Row]
    prompts: int
    better: int
    same: int
    worse: int
    ours: str
    theirs: str


def answers(samples: list[dict[str, Any]], ours: str, theirs: str) -> AnswerTable:
    """A dozen prompts of all kinds, chosen to show wins and losses of our model against theirs."""
    outcomes = [_outcome(sample["models"].get(ours, {}), sample["models"].get(theirs, {})) for sample in samples]
    count = {what: outcomes.count(what) for what in ("better", "same", "worse")}
    rows = [_row(samples[i], outcomes[i]) for i in _chosen(samples, outcomes)]
    names = model_name(ours), model_name(theirs)
    return AnswerTable(rows, len(samples), count["better"], count["same"], count["worse"], *names)


def _outcome(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Of their first samples; equal texts are the same, whatever they were graded."""
    a, b = _worth(ours), _worth(theirs)
    if a is None or b is None:
        return ""
    if ours["samples"][0] == theirs["samples"][0]:
        return "same"
    return "better" if a > b else "worse" if a < b else "same"


def _worth(model: dict[str, Any]) -> float | None:
    """Of a model's first sample."""
    if model.get("ranks"):
        return -model["ranks"][0]
    if model.get("grades"):
        return model["grades"][0]["gold"]
    return model["scores"][0] if model.get("scores") else None


def _chosen(samples: list[dict[str, Any]], outcomes: list[str]) -> list[int]:
    """Which prompts are shown: kinds take turns, so do wins and losses; the rest is chance (the same each time)."""
    pools: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        pools.setdefault(sample.get("kind") or "", []).append(i)
    for pool in pools.values():
        Random(0).shuffle(pool)
    outcomes_in_turn = ("better", "worse", "better", "same")
    chosen: list[int] = []
    while len(chosen) < min(ANSWERS_SHOWN, len(samples)):
        for pool in pools.values():
            if pool and len(chosen) < ANSWERS_SHOWN:
                outcome = outcomes_in_turn[len(chosen) % len(outcomes_in_turn)]
                found = next((i for i in pool if outcomes[i] == outcome), pool[0])
                pool.remove(found)
                chosen.append(found)
    return sorted(chosen)


def _row(sample: dict[str, Any], outcome: str) -> Row:
    prompt = sample["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    dialogue = [(m["role"], shortened(text_of(m))) for m in messages]
    return Row(sample.get("kind") or "", dialogue, outcome, [_column(*item) for item in sample["models"].items()])


def _column(name: str, model: dict[str, Any]) -> Column:
    scores, grades = model.get("scores"), model.get("grades")
    drawn = [
        Answer(shortened(text), _badges(grades and grades[i], None if scores is None else scores[i]))
        for i, text in enumerate(model["samples"])
    ]
    greedy = Answer(shortened(model["greedy"]), _badges(model.get("greedy_grade"), None))
    others = [("greedy", greedy), *((f"sample {i}", answer) for i, answer in enumerate(drawn[1:], start=2))]
    return Column(name, model_name(name), drawn[0], others)


def _badges(grade: dict[str, Any] | None, score: float | None) -> list[tuple[str, str]]:
    badges = []
    if grade:
        if grade["right"]:
            badges.append(("good", "✓ right"))
        elif grade["correct"] < 0:
            badges.append(("bad", "✗ wrong"))
        else:
            badges.append(("half", "partly right" if grade["correct"] > 0 else "no answer"))
        if grade["polite"]:
            badges.append(("good", "polite") if grade["polite"] > 0 else ("bad", "rude"))
        badges.append(("", f"gold {grade['gold']:g}".replace("-", "−")))
    if score is not None:
        badges.append(("", f"score {number(score)}"))
    return badges


def shortened(text: str) -> str:
    """At most ``TEXT_SHOWN`` characters, and a word on the rest."""
    rest = len(text) - TEXT_SHOWN
    return text if rest <= 0 else f"{text[:TEXT_SHOWN]}… ({number(rest)} more characters)"


def timelines(samples: list[dict[str, Any]], prompts: int = 2) -> list[tuple[str, list[tuple[int, str]]]]:
    """(prompt, [(step, text)]) of some prompts, at steps spread evenly over training."""
    steps = _spread(sorted({sample["step"] for sample in samples}), STEPS_SHOWN)
    lines: dict[tuple[str, int], list[tuple[int, str]]] = {}  # several texts of a step may begin alike: a line each
    for step in sorted(steps):
        seen: list[str] = []
        for sample in (sample for sample in samples if sample["step"] == step):
            prompt = sample["prompt"]
            lines.setdefault((prompt, seen.count(prompt)), []).append((step, shortened(sample["text"])))
            seen.append(prompt)
    chosen = sorted(_spread(range(len(lines)), prompts))
    return [(shortened(prompt), texts) for (prompt, _), texts in (list(lines.items())[i] for i in chosen)]


def _spread(items: Sequence[int], count: int) -> set[int]:
    if len(items) <= count:
        return set(items)
    return {items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)}
