"""Annotators, which rank answers. Prompts and answers in, ranks with ties out."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.models.answer_scorers import AnswerScorer, Layout, TextRewardModel, load_scorer
from lit_rlhf.models.reward_head import RewardTransformer
from lit_rlhf.stages.answer_scores import asked
from lit_rlhf.stages.callables import Annotator, Ranks, first_failing, name_of, place, resolve, run_async
from lit_rlhf.text.records import Messages, ranks_of
from lit_rlhf.text.template_form import Tools


def annotate(
    annotator: Annotator, prompts: Sequence[Messages], responses: Sequence[Sequence[str]], **beside: Sequence[Any]
) -> Ranks:
    """The annotator's ranks; raises ``UserError``, naming the prompt, where they are none.

    ``beside``: ``tools``, for one that takes them."""
    return check_ranks(annotator(prompts, responses, **beside), name_of(annotator), prompts, responses)


def check_ranks(ranks: Any, who: str, prompts: Sequence[Messages], responses: Sequence[Sequence[str]]) -> Ranks:
    """Ranks as plain lists; raises ``UserError`` where there is not one, a whole number from 1 up, for each answer."""
    if not isinstance(ranks, list | tuple) or len(ranks) != len(prompts):
        count = f"{len(ranks)} rankings" if isinstance(ranks, list | tuple) else f"a {type(ranks).__name__}"
        raise UserError(
            f"annotator {who} returned {count} for {len(prompts)} prompts; a list of ranks for each was expected"
        )
    checked = []
    for prompt, answers, row in zip(prompts, responses, ranks):
        row = row.tolist() if hasattr(row, "tolist") else row
        whole = isinstance(row, list | tuple) and all(type(rank) is int and rank >= 1 for rank in row)
        if not whole or len(row) != len(answers):
            raise UserError(
                f"annotator {who} returned {row!r} for the {len(answers)} answers to {place(prompt)}; {len(answers)} "
                "whole numbers were expected, 1 = best, ties allowed"
            )
        checked.append(list(row))
    return checked


class RewardModelAnnotator(nn.Module):
    """Ranks answers by the scores of a reward model, or of whatever else scores them; it is given the tools, too.

    Args:
        reward_model: what scores answers by their texts, or, with its tokenizer, a reward model that was trained here.
        tokenizer: of that one, with its chat template.
        batch_size: its answers per forward pass.
    """

    takes_tools = True

    def __init__(
        self,
        reward_model: AnswerScorer | PreTrainedModel | RewardTransformer,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: Annotated[int, Field(ge=1)] = 256,
    ) -> None:
        super().__init__()
        known = tokenizer is not None
        self.reward_model = TextRewardModel(reward_model, tokenizer, batch_size) if known else reward_model
        self.name = "reward_model" if isinstance(self.reward_model, nn.Module) else name_of(reward_model)

    @classmethod
    def load(
        cls,
        path: str | Path | Sequence[str | Path],
        batch_size: Annotated[int, Field(ge=1)] = 256,
        label: int | str | None = None,
        layout: Layout | None = None,
    ) -> RewardModelAnnotator:
        """Load an annotator from the folder of a reward model, or of several, as
        :func:`lit_rlhf.models.answer_scorers.load_scorer` does."""
        return cls(load_scorer(path, label=label, layout=layout, batch_size=batch_size))

    @torch.no_grad()
    def forward(
        self,
        prompts: Sequence[Messages],
        responses: Sequence[Sequence[str]],
        tools: Sequence[Tools] | None = None,
    ) -> Ranks:
        scores = iter(self.scores(prompts, responses, tools).tolist())
        ranked = []
        for answers in responses:
            scored = dict(zip(answers, [next(scores) for _ in answers]))  # equal texts differ by rounding alone
            ranked.append(ranks_of([scored[text] for text in answers]))
        return ranked

    def scores(
        self,
        prompts: Sequence[Messages],
        responses: Sequence[Sequence[str]],
        tools: Sequence[Tools] | None = None,
    ) -> Tensor:
        """Scores (N,) of all answers, prompt by prompt; raises ``UserError`` where one is left without."""
        messages = [p for p, answers in zip(prompts, responses) for _ in answers]
        record = {} if tools is None else {"tools": [t for t, answers in zip(tools, responses) for _ in answers]}
        texts = [text for answers in responses for text in answers]
        scores = asked(self.reward_model, messages, texts, record)
        if None in scores:
            raise UserError(
                f"annotator {self.name} has no score for an answer to {place(messages[scores.index(None)])}, which is "
                "to be ranked; take one that scores each answer"
            )
        return torch.tensor(scores)


class CallableAnnotator:
    """Ranks answers by a function of yours, plain or ``async``: ``fn(prompts, responses) -> ranks``.

    ``prompts`` are lists of messages, ``responses`` a list of texts for each; ``ranks`` is a list of ranks for each.
    A function with a parameter ``tools`` gets those of each prompt, too, or None.

    Args:
        function: the callable or its name, ``"my_module.my_function"``.
        batch_size: prompts per call; None: all that come together.
        concurrency: calls of an ``async`` function that wait at the same time.
    """

    def __init__(
        self,
        function: str | Callable[..., Any],
        batch_size: Annotated[int, Field(ge=1)] | None = None,
        concurrency: Annotated[int, Field(ge=1)] = 8,
    ) -> None:
        self.function = resolve(function, "preference.annotator.function")
        self.batch_size, self.concurrency = batch_size, concurrency
        self.name = name_of(self.function)
        self.takes_tools = "tools" in inspect.signature(self.function).parameters

    def __call__(
        self,
        prompts: Sequence[Messages],
        responses: Sequence[Sequence[str]],
        tools: Sequence[Tools] | None = None,
    ) -> Ranks:
        size = self.batch_size or max(len(prompts), 1)
        columns = [prompts, responses, *([tools or [None] * len(prompts)] if self.takes_tools else [])]
        batches = [[column[i : i + size] for column in columns] for i in range(0, len(prompts), size)]
        call = getattr(self.function, "__call__", None)  # noqa: B004  an object's own may be async
        if inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(call):
            ranked = run_async(self._together(batches))
        else:
            ranked = [self._call(*batch) for batch in batches]
        return [row for batch in ranked for row in batch]

    def _call(self, prompts: Sequence[Messages], responses: Sequence[Sequence[str]], *tools: Sequence[Tools]) -> Ranks:
        try:
            ranks = self._ask(prompts, responses, *tools)
        except Exception as error:
            i = first_failing(self._ask, [prompts, responses, *tools])
            raise self._error(error, prompts if i is None else prompts[i : i + 1]) from error
        return check_ranks(ranks, self.name, prompts, responses)

    async def _together(self, batches: Sequence[Any]) -> list[Ranks]:
        turns = asyncio.Semaphore(self.concurrency)

        async def wait(
            prompts: Sequence[Messages], responses: Sequence[Sequence[str]], *tools: Sequence[Tools]
        ) -> Ranks:
            async with turns:
                try:
                    ranks = await self._ask(prompts, responses, *tools)
                except Exception as error:
                    raise self._error(error, prompts) from error
            return check_ranks(ranks, self.name, prompts, responses)

        return await asyncio.gather(*(wait(*batch) for batch in batches))

    def _ask(self, prompts: Sequence[Messages], responses: Sequence[Sequence[str]], *tools: Sequence[Tools]) -> Any:
        return self.function(prompts, responses, **({"tools": tools[0]} if tools else {}))

    def _error(self, error: Exception, prompts: Sequence[Messages]) -> UserError:
        others = f" or one of the {len(prompts) - 1} after it" if len(prompts) > 1 else ""
        said = f"{type(error).__name__}: {error}"
        return UserError(f"annotator {self.name} raised {said}, on {place(prompts[0])}{others}")
