"""Agreement of several annotators of the same answers, and their majority.

Everything goes by pairs of answers: an annotator prefers one of two, or ties them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch

from lit_rlhf.functional import cohen_kappa, krippendorff_alpha, percent_agreement
from lit_rlhf.text.records import prompt_key, ranks_of

Pair = tuple[str, str, str]  # prompt, and two different answers in alphabetical order


class Agreement(NamedTuple):
    """Agreement of annotators about pairs of answers."""

    annotators: int
    pairs_shared: int  # that two or more of them judged
    annotators_agree: float  # fraction of those on which two annotators say the same
    alpha: float  # Krippendorff's, ordinal: better, tied, worse; 1 = always, 0 = as often as by chance
    kappa: float | None  # Cohen's, of two annotators


def agreement(rankings: Iterable[dict[str, Any]]) -> Agreement | None:
    """Agreement in ranking records with ``annotator``; None where no pair was judged by two."""
    judged = preferences(rankings)
    units = [pair for pair in {p: None for said in judged.values() for p in said} if _count(judged, pair) > 1]
    if not units:
        return None
    raters = [said for said in judged.values() if any(pair in said for pair in units)]
    ratings = torch.tensor([[said.get(pair, torch.nan) for pair in units] for said in raters], dtype=torch.float64)
    # Which of two answers stands first means nothing: each pair is also counted the other way round, so that chance
    # agreement is not that of an alphabetical accident.
    both = torch.cat([ratings, -ratings], dim=1)
    return Agreement(
        len(raters),
        len(units),
        percent_agreement(ratings).item(),
        krippendorff_alpha(both, "ordinal").item(),
        cohen_kappa(both).item() if len(raters) == 2 else None,
    )


def preferences(rankings: Iterable[dict[str, Any]]) -> dict[str, dict[Pair, float]]:
    """annotator -> pair -> 1: the first answer is better, -1: the second, 0: a tie. A later judgement replaces."""
    said: dict[str, dict[Pair, float]] = defaultdict(dict)
    for record in rankings:
        key = prompt_key(record["prompt"])
        ranked = sorted(zip(record["responses"], record["ranks"]))
        for (a, rank_a), (b, rank_b) in combinations(ranked, 2):
            if a != b:
                said[record.get("annotator", "")][key, a, b] = float((rank_b > rank_a) - (rank_b < rank_a))
    return dict(said)


def latest(rankings: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One ranking of the same answers by the same annotator: the last one."""
    return list({(record.get("annotator", ""), *_answers(record)): record for record in rankings}.values())


def majority(rankings: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Majority ranking of each prompt's answers: of each pair the answer that more annotators prefer wins.

    An equal vote is a tie. Ranks follow from the number of pairs won; a tie counts half."""
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for record in latest(rankings):
        groups[_answers(record)].append(record)
    return [group[0] if len(group) == 1 else _majority(group) for group in groups.values()]


def _majority(group: Sequence[dict[str, Any]]) -> dict[str, Any]:
    answers = group[0]["responses"]
    wins = dict.fromkeys(answers, 0.0)
    ranks = [dict(zip(record["responses"], record["ranks"])) for record in group]
    for a, b in combinations(wins, 2):
        votes = sum((r[a] < r[b]) - (r[b] < r[a]) for r in ranks)
        wins[a] += 0.5 + 0.5 * ((votes > 0) - (votes < 0))
        wins[b] += 0.5 - 0.5 * ((votes > 0) - (votes < 0))
    who = sorted({record.get("annotator", "") for record in group})
    return {**group[0], "ranks": ranks_of([wins[a] for a in answers]), "annotator": "majority", "annotators": who}


def _answers(record: dict[str, Any]) -> tuple[str, str]:
    return prompt_key(record["prompt"]), json.dumps(sorted(record["responses"]))


def _count(judged: dict[str, dict[Pair, float]], pair: Pair) -> int:
    return sum(pair in said for said in judged.values())
