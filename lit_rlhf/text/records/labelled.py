"""Labelled texts, multiple choice, pairs of similar texts, and open questions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lit_rlhf.text.records.fields import require, short, text_field
from lit_rlhf.text.records.messages import Messages, text_of
from lit_rlhf.text.records.prompts import instruction_of


@dataclass(frozen=True)
class LabelledText:
    """A text, or a premise and a hypothesis, and its label."""

    texts: tuple[str, ...]  # one or two, in this order
    label: str
    place: str = field(default="", compare=False)  # file and line


@dataclass(frozen=True)
class MultipleChoice:
    """A question or a text that breaks off, and what may follow."""

    context: str
    choices: tuple[str, ...]
    answer: int  # index of the right choice, from 0
    place: str = field(default="", compare=False)  # file and line


@dataclass(frozen=True)
class Similarity:
    """Two texts without an order, and how they are related."""

    text_a: str
    text_b: str
    label: str
    place: str = field(default="", compare=False)  # file and line


@dataclass(frozen=True)
class OpenQuestion:
    """A question and the answers that count as right."""

    question: str
    answers: tuple[str, ...]
    place: str = field(default="", compare=False)  # file and line


Labelled = LabelledText | MultipleChoice | Similarity
Task = Labelled | OpenQuestion


def parse_labelled(row: dict[str, Any]) -> Labelled:
    """``text`` + ``label``, ``premise`` + ``hypothesis`` + ``label``, ``text_a`` + ``text_b`` + ``label``, or
    ``context`` (or ``prompt``) + ``choices`` + ``label``, which is an index from 0 or the right choice itself."""
    if "choices" in row:
        return _multiple_choice(row)
    if "text_a" in row or "text_b" in row:
        return Similarity(text_field(row, "text_a"), text_field(row, "text_b"), _label(row))
    names = ("premise", "hypothesis") if "premise" in row or "hypothesis" in row else ("text",)
    return LabelledText(tuple(text_field(row, name) for name in names), _label(row))


def parse_task(row: dict[str, Any]) -> Task:
    """:func:`parse_labelled`; or ``prompt`` (a string) + ``answers``, ``response``, ``completion`` or ``output``, to be
    met word for word."""
    if "choices" in row or "label" in row:
        return parse_labelled(row)
    name = next((n for n in ("answers", "response", "completion", "output") if n in row), "answers")
    answers = require(row, name)
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise ValueError(f"'{name}' is {short(answers)}; a string, or a list of them, was expected")
    if "instruction" in row:
        return OpenQuestion(text_of(instruction_of(row)[0]), tuple(answers))
    return OpenQuestion(text_field(row, "prompt"), tuple(answers))


def task_prompt(task: Task) -> Messages:
    """The prompt of a labelled record for the split: the text, the premise, the first of two texts, or the question."""
    if isinstance(task, LabelledText):
        text = task.texts[0]
    elif isinstance(task, MultipleChoice):
        text = task.context
    else:
        text = task.text_a if isinstance(task, Similarity) else task.question
    return [{"role": "user", "content": text}]


def _multiple_choice(row: dict[str, Any]) -> MultipleChoice:
    choices, label = row["choices"], _given(row)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ValueError(f"'choices' is {short(choices)}; a list of two or more non-empty strings was expected")
    if len(set(choices)) < len(choices):
        raise ValueError(f"'choices' is {short(choices)}; two of them are the same")
    if label in choices:
        label = choices.index(label)
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
        raise ValueError(
            f"'label' is {short(label)}; the right choice, or its index from 0 to {len(choices) - 1}, was expected"
        )
    return MultipleChoice(text_field(row, "context" if "context" in row else "prompt"), tuple(choices), label)


def _given(row: dict[str, Any]) -> Any:
    """The label; 1.0, as tables with empty cells have it, is 1."""
    label = require(row, "label")
    return int(label) if isinstance(label, float) and label.is_integer() else label


def _label(row: dict[str, Any]) -> str:
    label = _given(row)
    if not isinstance(label, str | int) or not str(label).strip():
        raise ValueError(f"'label' is {short(label)}; a name or a whole number was expected")
    return str(label)
