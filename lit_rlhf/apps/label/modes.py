"""Tasks of the labelling page: which items a record gives, and how a judgement of one becomes a record."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, ClassVar, Protocol

from lit_rlhf.text.records import Messages, parse_demonstration, parse_prompt, parse_ranking, prompt_key, text_of
from lit_rlhf.text.records.messages import DIALOGUES, dialogue, dialogue_name
from lit_rlhf.text.template_form import REASONING

MOST_ANSWERS = 16  # each has a key of its own
ANSWERS = ("responses", "chosen", "completions", "response_1", "response1")  # fields of records with several answers
CALLS_AND_THOUGHTS = {"tool_calls", *REASONING}  # fields of an answer beside its text

# Fields of a record that its judgement says anew; the others (model, round, sampling, kind ...) are kept with it.
_SAID_ANEW = {
    *DIALOGUES, *ANSWERS, "prompt", "system", "instruction", "input", "context", "response", "completion", "output",
    "rejected", "response_2", "response2", "ranks", "scores", "margin", "score_chosen", "score_rejected",
    "preference_strength", "overall_preference", "rating", "label", "helpfulness", "annotator", "note", "seconds",
    "shown", "item", "turn", "time", "aside", "again",
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One thing to judge."""

    prompt: Messages
    responses: list[str]  # to be ranked (K), rated (one), or to begin writing from (one or none)
    others: dict[str, Any] = field(default_factory=dict)  # where it comes from

    @property
    def id(self) -> str:
        """A digest of prompt and responses."""
        said = json.dumps([prompt_key(self.prompt), self.responses], ensure_ascii=False)
        return hashlib.sha256(said.encode()).hexdigest()[:16]


class Task(Protocol):
    """One of the three tasks of the labelling page."""

    mode: ClassVar[str]
    file: ClassVar[str]  # the judgements' file in data/, without round and suffix
    can_repeat: ClassVar[bool]

    def items(self, row: dict[str, Any]) -> list[Item]:
        """The items of a record; raises ``ValueError`` where it is not of a kind that can be judged so."""
        ...

    def record(self, item: Item, shown: list[int], verdict: Any) -> dict[str, Any]:
        """The fields of the record of a ``verdict``; ``ValueError`` where it says nothing.

        ``shown``: which response stood in each place of the page."""
        ...

    def verdict(self, record: dict[str, Any]) -> Any:
        """The verdict that a record was made from."""
        ...

    def agreement(self, first: dict[str, Any], second: dict[str, Any]) -> tuple[int, int]:
        """(judged alike, compared) of two records of one item."""
        ...


class Rank:
    """K answers to one prompt, from best to worst, ties allowed; gives ranking records."""

    mode, file, can_repeat = "rank", "labels", True

    def items(self, row: dict[str, Any]) -> list[Item]:
        """``prompt`` and ``responses``, or a pair; ranks that are there are not shown."""
        prompt, responses, _ = _answered(row)
        if len(responses) > MOST_ANSWERS:
            raise ValueError(f"'responses' has {len(responses)} entries; the page takes up to {MOST_ANSWERS}")
        return [Item(prompt, responses, _others(row))]

    def record(self, item: Item, shown: list[int], verdict: Any) -> dict[str, Any]:
        """``verdict``: a rank for each place of the page; equal ones are ties."""
        k = len(item.responses)
        if not isinstance(verdict, list) or len(verdict) != k:
            raise ValueError(f"each of the {k} answers needs a rank")
        if not all(isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1 for rank in verdict):
            raise ValueError("ranks are whole numbers from 1 (best) up")
        dense = {rank: place for place, rank in enumerate(sorted(set(verdict)), start=1)}
        ranks = [0] * k
        for place, response in enumerate(shown):
            ranks[response] = dense[verdict[place]]
        return {"prompt": item.prompt, "responses": item.responses, "ranks": ranks}

    def verdict(self, record: dict[str, Any]) -> list[int]:
        """Ranks by place on the page."""
        return [record["ranks"][response] for response in record["shown"]]

    def agreement(self, first: dict[str, Any], second: dict[str, Any]) -> tuple[int, int]:
        """Over the C(K,2) pairs: the same order, or a tie both times."""
        orders = [
            [(r["ranks"][i] > r["ranks"][j]) - (r["ranks"][i] < r["ranks"][j]) for i, j in _pairs(len(r["ranks"]))]
            for r in (first, second)
        ]
        return sum(a == b for a, b in zip(*orders)), len(orders[0])


class Rate:
    """One answer at a time: thumbs, or a number; gives feedback records."""

    mode, file, can_repeat = "rate", "feedback", True

    def __init__(self, scale: int) -> None:
        self.ratings = [-1, 1] if scale == 2 else list(range(1, scale + 1))  # from worst to best

    def items(self, row: dict[str, Any]) -> list[Item]:
        """Each of ``responses``, or the one ``response``."""
        prompt, responses, _ = _answered(row)
        others, k = _others(row), len(responses)
        # A list with one entry per response says it of each: models, finished ...
        lists = {key for key, value in others.items() if k > 1 and isinstance(value, list) and len(value) == k}
        per_response = lists - {"tools"}
        return [
            Item(prompt, [text], {key: v[i] if key in per_response else v for key, v in others.items()})
            for i, text in enumerate(responses)
        ]

    def record(self, item: Item, shown: list[int], verdict: Any) -> dict[str, Any]:
        """``verdict``: one of the ratings."""
        if isinstance(verdict, bool) or verdict not in self.ratings:
            raise ValueError(f"a rating is one of {', '.join(map(str, self.ratings))}")
        return {"prompt": item.prompt, "response": item.responses[0], "rating": verdict}

    def verdict(self, record: dict[str, Any]) -> int:
        """The rating."""
        return record["rating"]

    def agreement(self, first: dict[str, Any], second: dict[str, Any]) -> tuple[int, int]:
        """Whether the ratings are the same."""
        return int(first["rating"] == second["rating"]), 1


class Write:
    """The ideal answer, written or edited; gives demonstration records."""

    mode, file, can_repeat = "write", "demonstrations", False

    def __init__(self, drafts: bool) -> None:
        self.drafts = drafts

    def items(self, row: dict[str, Any]) -> list[Item]:
        """A prompt, with an answer to begin from where the record has one: of several the best, else the first."""
        if not _has_answer(row):
            return [Item(parse_prompt(row), [], _others(row))]
        prompt, responses, ranks = _answered(row)
        best = responses[ranks.index(min(ranks))]
        return [Item(prompt, [best] if self.drafts else [], _others(row))]

    def record(self, item: Item, shown: list[int], verdict: Any) -> dict[str, Any]:
        """``verdict``: the answer's text."""
        if not isinstance(verdict, str) or not verdict.strip():
            raise ValueError("the answer is empty; write one, or skip this prompt")
        return {"prompt": item.prompt, "response": verdict.strip()}

    def verdict(self, record: dict[str, Any]) -> str:
        """The text."""
        return record["response"]

    def agreement(self, first: dict[str, Any], second: dict[str, Any]) -> tuple[int, int]:
        """Nobody writes one answer twice."""
        return 0, 0


def _has_answer(row: dict[str, Any]) -> bool:
    if any(row.get(name) for name in (*ANSWERS, "response", "completion", "output")):
        return True
    name = dialogue_name(row)
    return name is not None and dialogue(row, name)[-1]["role"] == "assistant"


def _answered(row: dict[str, Any]) -> tuple[Messages, list[str], list[int]]:
    """Prompt, answers and ranks of a ranking (with ranks or before it has any), pair, demonstration or feedback record;
    answers that nobody has ranked tie."""
    if any(name in row for name in ANSWERS):
        said = {name: value for name, value in row.items() if value is not None}
        if isinstance(said.get("responses"), list) and "scores" not in said:
            said = {"ranks": [1] * len(said["responses"]), **said}
        ranking = parse_ranking(said)
        prompt, answers, ranks = ranking.prompt, ranking.turns, ranking.ranks
    else:
        *asked, answer = parse_demonstration(row).messages
        prompt, answers, ranks = parse_prompt({"prompt": asked}), [answer], [1]
    if any(CALLS_AND_THOUGHTS & answer.keys() for answer in answers):
        raise ValueError("an answer has calls of tools or a thought, and people are shown and judge texts alone")
    return prompt, [*map(text_of, answers)], ranks


def _others(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in _SAID_ANEW}


def _pairs(k: int) -> list[tuple[int, int]]:
    return list(combinations(range(k), 2))
