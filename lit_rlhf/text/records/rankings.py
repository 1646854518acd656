"""Rankings of several answers, and pairs, which are rankings of two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from lit_rlhf.text.records.fields import number, remark, require, short
from lit_rlhf.text.records.messages import (
    TRANSCRIPT,
    TURN,
    Messages,
    answer_turn,
    dialogue_name,
    is_plain,
    messages_of,
    parse_transcript,
    text_of,
    tools_of,
    transcript_tail,
    with_system,
)
from lit_rlhf.text.records.prompts import parse_prompt, parse_prompt_apart

PER_ANSWER = ("models", "temperatures", "finished")  # lists with an entry for each response
LINEAGE = ("model", "round", "sampling", "kind", *PER_ANSWER)
# HelpSteer's preferences, of the second and the third edition: two responses, and a number below 0 for the first
_TWO = (("response_1", "response_2", "preference_strength"), ("response1", "response2", "overall_preference"))
_SYSTEM = ("system", "developer")
_RATED = {"rating", "label", "helpfulness"}  # fields of feedback


@dataclass(frozen=True)
class Ranking:
    """K responses to one prompt and their ranks, 1 = best, ties allowed. A pair is a ranking of two."""

    prompt: Messages
    responses: list[str]
    ranks: list[int]
    annotator: str = ""
    lineage: dict[str, Any] = field(default_factory=dict)  # which model, round and sampling settings made the responses
    ratings: list[float] | None = None  # 0 (worst) to 1 (best), where the ranks come from feedback
    margins: list[float] | None = None  # the scores of two answers are to differ by the difference of theirs
    tools: list[dict[str, Any]] | None = None  # functions that the assistant may call, for the chat template
    answers: Messages | None = None  # the responses as messages, where one has more than a text: calls, a thought
    place: str = field(default="", compare=False)  # file and line

    @property
    def turns(self) -> Messages:
        """The responses as messages."""
        return self.answers or [*map(answer_turn, self.responses)]


def parse_ranking(row: dict[str, Any], margin: bool = False, score_margin: float = 0.0) -> Ranking:
    """``prompt``, ``responses``, and ``ranks`` or ``scores``; or a pair: [``prompt``,] ``chosen``, ``rejected``.

    ``chosen`` and ``rejected`` are answers, messages (as in TRL), or whole transcripts (as in hh-rlhf). Of messages
    the last one is the answer, with its calls and thoughts; those before it have to be the same in both. Also
    UltraFeedback's ``completions``, and HelpSteer's ``response_1``, ``response_2`` and ``preference_strength`` (below
    0: the first is better), or ``context``, ``response1``, ``response2`` and ``overall_preference``. An empty response
    is an answer that says nothing, which models do; it may be ranked.

    ``tools`` go to the chat template. ``margin``: a pair's field of that name is read, too. ``score_margin``: what the
    scores of two answers are to differ by for each point between them in ``score_chosen`` and ``score_rejected``,
    ``scores``, or ``preference_strength``; 0: these are not read where there are ranks."""
    if isinstance(dict.get(row, "completions"), list):
        return _completions(row, score_margin)
    points: list[float] | None = None
    answers: Messages = []
    if "chosen" in row or "rejected" in row:
        prompt, answers = _pair(row, ("chosen", "rejected"))
        # Of two equal answers none is better: a tie, from which nothing is learned.
        ranks = [1, 1] if answers[0] == answers[1] else [1, 2]
        if score_margin and "score_chosen" in row:
            points = [number(require(row, name), name) for name in ("score_chosen", "score_rejected")]
    elif two := next((names for names in _TWO if names[0] in row or names[1] in row), None):
        prompt, answers = _pair(row, two[:2])
        strength = number(require(row, two[2]), two[2])
        points = [max(-strength, 0.0), max(strength, 0.0)] if answers[0] != answers[1] else [0.0, 0.0]
        ranks = ranks_of(points)
    else:
        responses = _responses(row)
        if "scores" in row and (score_margin or "ranks" not in row):
            points = _points(row["scores"], len(responses))
        ranks = _ranks(row, len(responses)) if "ranks" in row or points is None else ranks_of(points)
        prompt = parse_prompt_apart(row)
        _check_equal(responses, ranks)
    responses = [*map(text_of, answers)] or responses
    margins = _margins(ranks, points, score_margin) if score_margin and points else None
    if margin and dict.get(row, "margin") is not None:
        margins = _given_margin(row, ranks)
    lineage = _lineage(row, len(responses))
    annotator, whole = str(row.get("annotator") or ""), None if all(map(is_plain, answers)) else answers
    return Ranking(prompt, responses, ranks, annotator, lineage, None, margins, tools_of(row), whole)


def ranks_of(points: Sequence[float]) -> list[int]:
    """Ranks, 1 for the most points; equal points tie: [0.5, 2.0, 0.5] -> [2, 1, 2]."""
    order = sorted(points, reverse=True)
    return [order.index(value) + 1 for value in points]


def _responses(row: dict[str, Any]) -> list[str]:
    if "responses" not in row and {"response", "completion"} & row.keys() and _RATED & row.keys():
        raise ValueError(
            "one answer with a rating or a label is feedback and not a ranking; a reward model takes such a file as "
            "reward.data.feedback= (with reward.data.path=null where there are no rankings), DPO none"
        )
    responses = require(row, "responses")
    if not isinstance(responses, list) or len(responses) < 2 or not all(isinstance(r, str) for r in responses):
        raise ValueError(f"'responses' is {short(responses)}; a list of two or more strings was expected")
    return responses


def _ranks(row: dict[str, Any], count: int) -> list[int]:
    ranks = require(row, "ranks")
    if not isinstance(ranks, list) or len(ranks) != count:
        given = len(ranks) if isinstance(ranks, list) else 0
        raise ValueError(
            f"'ranks' has {given} entries for {count} responses. Give one rank per response (1 = best, ties allowed)"
        )
    if not all(isinstance(r, int) and not isinstance(r, bool) and 1 <= r < 2**31 for r in ranks):
        raise ValueError(f"'ranks' is {short(ranks)}; whole numbers from 1 (best) up were expected")
    return ranks


def _points(values: Any, count: int) -> list[float]:
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"'scores' is {short(values)}; a list of {count} numbers, one per response, was expected")
    return [number(value, "scores", "a number per response") for value in values]


def _margins(ranks: list[int], points: list[float], scale: float) -> list[float]:
    for i, a in enumerate(ranks):
        for j, b in enumerate(ranks):
            if a < b and points[i] < points[j]:
                raise ValueError(
                    f"answer {i + 1} is ranked above answer {j + 1} and has the lower score ({points[i]:g} and "
                    f"{points[j]:g}), from which no margin follows (score_margin)"
                )
    return [scale * value for value in points]


def _given_margin(row: dict[str, Any], ranks: list[int]) -> list[float]:
    margin = number(row["margin"], "margin", "a number from 0 up")
    if margin < 0:
        raise ValueError(f"'margin' is {margin:g}; a number from 0 up was expected")
    if len(ranks) != 2:
        raise ValueError(f"'margin' is for two answers, and there are {len(ranks)}")
    return [margin if rank < max(ranks) else 0.0 for rank in ranks]


def _lineage(row: dict[str, Any], count: int) -> dict[str, Any]:
    for name in PER_ANSWER:
        if name in row and (not isinstance(row[name], list) or len(row[name]) != count):
            raise ValueError(f"'{name}' is {short(row[name])}; a list of {count}, one per response, was expected")
    return {key: row[key] for key in LINEAGE if key in row}


def _check_equal(responses: list[str], ranks: list[int]) -> None:
    known: dict[str, int] = {}
    for i, (text, rank) in enumerate(zip(responses, ranks)):
        first = known.setdefault(text, i)
        if rank != ranks[first]:
            raise ValueError(
                f"responses {first + 1} and {i + 1} are the same text, {short(text)}, with the ranks {ranks[first]} "
                f"and {rank}. Give equal answers one rank, or leave one out"
            )


def _completions(row: dict[str, Any], score_margin: float) -> Ranking:
    """UltraFeedback as it was collected: several models' answers, each with a score; equal answers count once, with
    the mean of their scores."""
    prompt, scores, models = parse_prompt_apart(row), dict[str, list[float]](), dict[str, str]()
    for completion in row["completions"]:
        if not isinstance(completion, dict) or not isinstance(completion.get("response"), str):
            raise ValueError(f"'completions' holds {short(completion)}; each needs 'response' and 'overall_score'")
        scores.setdefault(completion["response"], []).append(_overall(completion))
        models.setdefault(completion["response"], str(completion.get("model", "")))
    if len(scores) < 2:
        raise ValueError(f"'completions' holds {len(scores)} different answers; two or more were expected")
    points = [sum(values) / len(values) for values in scores.values()]
    margins = [score_margin * value for value in points] if score_margin else None
    _ = row.get("models")  # the same names once more
    lineage = {"models": list(models.values())}
    return Ranking(prompt, list(scores), ranks_of(points), "", lineage, None, margins, tools_of(row))


def _overall(completion: dict[str, Any]) -> float:
    """The overall score of an answer, else the mean of its ratings by aspect (``annotations``)."""
    if completion.get("overall_score") is not None:
        return number(completion["overall_score"], "overall_score")
    aspects = completion.get("annotations")
    found = aspects.values() if isinstance(aspects, dict) else ()
    ratings = [a["Rating"] for a in found if isinstance(a, dict) and a.get("Rating") not in (None, "N/A")]
    if not ratings:
        raise ValueError(f"'completions' holds {short(completion)}; 'overall_score', or 'annotations', was expected")
    return sum(number(rating, "Rating") for rating in ratings) / len(ratings)


def _pair(row: dict[str, Any], names: Sequence[str]) -> tuple[Messages, Messages]:
    """The prompt, and the two answers in the fields ``names``."""
    values = [require(row, name) for name in names]
    apart = "prompt" in row or "instruction" in row or "chosen" not in names
    if not apart and dialogue_name(row) is None:
        whole = [_dialogue(value, name) for value, name in zip(values, names)]
        prompt, answers = _parted(whole, names, transcripts=all(isinstance(value, str) for value in values))
        if any(TRANSCRIPT in text_of(answer) for answer in answers):
            remark(row, "the transcripts part before their last answer: what follows, of Human: too, is one answer")
        return with_system(row, prompt), answers
    # In ShareGPT's pairs the dialogue is what was said before.
    prompt = parse_prompt_apart(row) if apart else parse_prompt(row)
    return _parted([_continued(prompt, value, name) for value, name in zip(values, names)], names)


def _continued(prompt: Messages, value: Any, name: str) -> Messages:
    """The prompt and the answer, of which messages and whole transcripts may repeat the prompt."""
    if isinstance(value, str) and not value.startswith(TRANSCRIPT):
        return [*prompt, answer_turn(value)]
    if isinstance(value, dict):  # ShareGPT's pairs: one message
        value = [value]
    if not isinstance(value, str | list):
        raise ValueError(f"'{name}' is {short(value)}; an answer or messages were expected")
    messages = _dialogue(value, name)
    system, known = _systems(messages), _systems(prompt)
    said, asked = messages[len(system) :], prompt[len(known) :]
    if system and known and system != known:
        texts = short(text_of(system[0])), short(text_of(known[0]))
        raise ValueError(f"two system messages: {texts[0]} in '{name}', and {texts[1]}")
    if said[0]["role"] != "assistant":
        repeated, said = said[: len(asked)], said[len(asked) :]
        if [text_of(m).strip() for m in repeated] != [text_of(m).strip() for m in asked] or not said:
            texts = short(text_of(messages[-2]).strip()), short(text_of(asked[-1]).strip())
            raise ValueError(f"'{name}' answers {texts[0]}, but 'prompt' is {texts[1]}")
    return [*(known or system), *asked, *said]


def _systems(messages: Messages) -> Messages:
    return [*takewhile(lambda message: message["role"] in _SYSTEM, messages)]


def _dialogue(value: Any, name: str) -> Messages:
    if isinstance(value, list):
        return _assistants(messages_of(value, name), name)
    if not isinstance(value, str) or not TURN.match(value):
        raise ValueError(f"no 'prompt', and '{name}' is {short(value)}, not a transcript of Human: and Assistant:")
    messages = parse_transcript(value)
    # An empty last answer was parsed as an open prompt; in a pair it is an answer that says nothing.
    if value.rstrip().endswith("Assistant:"):
        messages = [*messages, {"role": "assistant", "content": ""}]
    return _assistants(messages, name)


def _assistants(messages: Messages, name: str) -> Messages:
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"'{name}' ends with a turn of the {messages[-1]['role']}; it must end with the assistant's")
    return messages


def _parted(
    dialogues: Sequence[Messages], names: Sequence[str], transcripts: bool = False
) -> tuple[Messages, Messages]:
    """What two dialogues have in common, and the answers with which they part."""
    one, other = dialogues
    both = "{!r} and {!r}".format(*names)
    if _systems(one) != _systems(other):
        raise ValueError(f"{both} do not have the same system message; give it to both, or to the prompt alone")
    shared = 0
    while shared < min(len(one), len(other)) - 1 and one[shared] == other[shared]:
        shared += 1
    turns = [(a["role"], b["role"]) for a, b in zip(one, other)]
    while shared and (turns[shared - 1][0] == "assistant" or turns[shared] != ("assistant", "assistant")):
        shared -= 1
    if all(role in _SYSTEM for role, _ in turns[:shared]):
        raise ValueError(f"{both} do not begin with the same turn of the user and an answer to it")
    prompt, answers = one[:shared], [dialogue[shared:] for dialogue in dialogues]
    if transcripts:  # where they part before the last answer, everything after the shared prompt is the answer
        return prompt, [answer_turn(transcript_tail(answer)) for answer in answers]
    if any(len(answer) > 1 for answer in answers):
        raise ValueError(
            f"{both} part before their last turns, and single answers are compared; end each with the first turn that "
            "differs"
        )
    return prompt, [answer for (answer,) in answers]
