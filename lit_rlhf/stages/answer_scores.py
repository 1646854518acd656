"""Scores of answers, whoever gives them: a reward model that reads their tokens, or what is asked by text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_rlhf.errors import UserError
from lit_rlhf.functional import ScoreScale
from lit_rlhf.models.answer_scorers import AnswerScorer, scale_of
from lit_rlhf.models.heads import AnyRewardModel, scores_of
from lit_rlhf.models.policy import freeze
from lit_rlhf.stages.callables import first_failing, name_of
from lit_rlhf.stages.prompts import PromptBatch
from lit_rlhf.text.packing import Packed
from lit_rlhf.text.records import Messages, shown

OWN = ("prompts", "responses", "finished")  # what a scorer is asked by that no field of a record can stand for
RewardModel = AnyRewardModel | AnswerScorer


def frozen(reward_model: Any) -> Any:
    """The reward model, without gradients and dropout where it is one of torch."""
    return freeze(reward_model) if isinstance(reward_model, nn.Module) else reward_model


def title_of(reward_model: RewardModel) -> str:
    """What a reward model is called in figures."""
    return "reward model" if isinstance(reward_model, AnyRewardModel) else name_of(reward_model)


def knows_scale(reward_model: RewardModel) -> bool:
    """Whether scores can be divided by their standard deviation over sampled answers."""
    return isinstance(reward_model, AnyRewardModel) or getattr(reward_model, "score_std", None) is not None


def scores_by(
    reward_model: RewardModel,
    packed: Iterable[Packed],
    prompts: list[Messages],
    responses: list[str],
    record: dict[str, list[Any]],
    scale: bool,
    center: bool = False,
    device: torch.device | None = None,
) -> Tensor:
    """Scores (N,) of answers, NaN where nothing is said; of those that read tokens, ``packed`` ends with them.

    ``scale`` and ``center`` as in :func:`lit_rlhf.models.heads.scores_of`; ``device``: where to put what is asked by
    text."""
    if isinstance(reward_model, AnyRewardModel):
        return scores_of(reward_model, packed, scale=scale, center=center)
    units = scale_of(reward_model) if scale or center else ScoreScale()
    said = [math.nan if score is None else score for score in asked(reward_model, prompts, responses, record)]
    return units(torch.tensor(said, device=device), divide=scale, center=center)


def is_score(number: float) -> bool:
    """Whether a number can be a score: float32 holds it."""
    return abs(number) <= torch.finfo(torch.float32).max


def record_of(prompts: PromptBatch, finished: Sequence[bool]) -> dict[str, list[Any]]:
    """What scorers get to know besides prompts and responses, a list each."""
    names = dict.fromkeys(name for record in prompts.records for name in record if name not in OWN)
    columns = {name: [record.get(name) for record in prompts.records] for name in names}
    return {**columns, "kind": prompts.kinds, "finished": list(finished)}


def asked(
    scorer: AnswerScorer, prompts: list[Messages], responses: list[str], record: dict[str, list[Any]]
) -> list[float | None]:
    """The scores of a reward function, None where it says nothing.

    Raises ``UserError`` where it fails: on which prompt, on which answer."""
    name, columns = name_of(scorer), [prompts, responses, *record.values()]

    def ask(prompts: list[Messages], responses: list[str], *others: list[Any]) -> list[float | None]:
        scores = scorer(prompts, responses, **dict(zip(record, others)))
        return [None if score is None else float(score) for score in scores]

    try:
        scores = ask(*columns)
    except UserError:  # which says all that there is to say
        raise
    except Exception as error:
        i = first_failing(ask, columns) or 0
        raise UserError(
            f"reward function {name} raised {type(error).__name__}: {error}, on {_place(prompts, responses, i)}"
        ) from error
    if len(scores) != len(responses):
        raise UserError(
            f"reward function {name} returned {len(scores)} scores for {len(responses)} answers; one each was "
            "expected, a number or None"
        )
    for i, score in enumerate(scores):
        if score is not None and not is_score(score):
            raise UserError(
                f"reward function {name} returned {score}, not a finite number, for {_place(prompts, responses, i)}; "
                "where it has nothing to say, None"
            )
    return scores


def _place(prompts: list[Messages], responses: list[str], i: int) -> str:
    return f"the prompt {shown(prompts[i])[:80]!r} and the answer {responses[i][:80]!r} ({i + 1} of {len(responses)})"
