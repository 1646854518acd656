"""Rankings to learn from, and demonstrations whose scores are to average 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import Field

from lit_rlhf.errors import UserError
from lit_rlhf.stages.rankings import RankingDataModule, WorldRankingDataModule
from lit_rlhf.stages.records import names_of
from lit_rlhf.text.chat import encode_prompts, encode_responses
from lit_rlhf.text.records import (
    Demonstration,
    Paths,
    Ranking,
    answer_turn,
    parse_demonstration,
    parse_feedback,
    parse_ranking,
    rankings_of_feedback,
    rating_scale,
)

PromptAndAnswer = tuple[list[int], int]  # tokens of prompt and answer, and how many at the end are the answer's


class CalibrationSet(NamedTuple):
    """Data that a trained reward model's scores are shifted and scaled by."""

    demonstrations: list[PromptAndAnswer]  # are to score 0 on average
    answers: list[PromptAndAnswer]  # whose scores' mean and standard deviation are noted


@dataclass(eq=False, repr=False, kw_only=True)
class RewardDataModule(RankingDataModule):
    """Rankings or pairs from a file; arguments as in :class:`RankingDataModule`, and

    Args:
        demonstrations: file of demonstrations whose mean score becomes 0; None: the best-ranked training answers.
        feedback: file of answers with ``rating`` (thumbs, or numbers), beside the rankings or, where ``path`` is None,
            alone. Answers to one prompt that are rated differently are pairs; the others are learned from one by one.
        score_margin: by how much the scores of two answers are to differ for each point between those that they have in
            the file (``score_chosen`` and ``score_rejected``, ``scores``, ``preference_strength``); 0: these are not
            used. A pair's ``margin`` is used always.
    """

    parse_record = staticmethod(partial(parse_ranking, margin=True))

    path: Paths | None = field(kw_only=False)
    demonstrations: Paths | None = None
    feedback: Paths | None = None
    score_margin: Annotated[float, Field(ge=0)] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path is None and self.feedback is None:
            raise UserError("neither path (rankings) nor feedback is given (reward.data); one of them is needed")
        self.path = self.path or []
        if self.score_margin:
            self.parse_record = partial(parse_ranking, margin=True, score_margin=self.score_margin)

    @property
    def source(self) -> str:
        return ", ".join(filter(None, (names_of(paths or []) for paths in (self.path, self.feedback))))

    def rankings(self) -> Sequence[Ranking]:
        """All rankings, those that follow from feedback last."""
        rankings = super().rankings()
        if self.demonstrations is not None:
            self._demonstrations = self.load(self.demonstrations, parse_demonstration)
        if self.feedback is None:
            return rankings
        feedback = self.load(self.feedback, parse_feedback)
        low, high = rating_scale(feedback)
        if {f.rating for f in feedback} - {-1, 1}:
            self.note(f"{names_of(self.feedback)}: ratings are read from {low:g} (bad) to {high:g} (good)")
        return [*rankings, *rankings_of_feedback(feedback)]

    def answered(self, train: Sequence[Ranking]) -> Sequence[Demonstration]:
        """The demonstrations that are to score 0 on average: of each its last answer."""
        if self.demonstrations is not None:
            return self._demonstrations
        best = [(r, r.turns[r.ranks.index(min(r.ranks))]) for r in train]
        return [Demonstration([*r.prompt, turn], len(r.prompt), r.tools) for r, turn in best]

    def setup(self, stage: str | None = None) -> None:
        if self.train_set:
            return
        super().setup(stage)
        encoded = self._encode_answered(self.answered(self.train_records[: self.limit][:1000])[:1000])
        demonstrations = [([*p, *r][-self.max_length :], min(len(r), self.max_length - 1)) for p, r in encoded]
        answers = [pair for item in self.train_set[:512] for pair in zip(item.sequences, item.response_lengths)]
        self.calibration = CalibrationSet(demonstrations, answers)

    def _encode_answered(self, demonstrations: Sequence[Demonstration]) -> list[tuple[list[int], list[int]]]:
        """(tokens of the prompt, tokens of the answer), without those that the template refuses."""
        refused: dict[int, str] = {}
        prompts, tools = [d.messages[:-1] for d in demonstrations], [d.tools for d in demonstrations]
        answers = [d.messages[-1] for d in demonstrations]
        settings = {"special_tokens": self.special_tokens, "refuse": refused.setdefault, "note": self.note}
        before = encode_prompts(self.tokenizer, prompts, tools, **settings)
        behind = encode_responses(self.tokenizer, prompts, answers, tools, **settings)
        if self.demonstrations is not None:  # a ranking that is refused was counted before
            for i, reason in sorted(refused.items()):
                self.refuse(demonstrations[i], reason)
        if len(refused) == len(demonstrations):
            raise UserError(
                f"{self.demonstrations or self.source}: the chat template refuses every demonstration; the first: "
                f"{refused[0]}"
            )
        return [(p, r) for i, (p, r) in enumerate(zip(before, behind)) if i not in refused]

    def for_module(self) -> dict[str, Any]:
        rankings = self.train_records, self.val_records
        return {**super().for_module(), "calibration": self.calibration, "rankings": rankings}


@dataclass(eq=False, repr=False)
class WorldRewardDataModule(WorldRankingDataModule, RewardDataModule):
    """Rankings of the built-in world's prompts; its demonstrations are to score 0 on average."""

    demonstrations: ClassVar[None] = None
    score_margin: ClassVar[float] = 0.0

    def answered(self, train: Sequence[Ranking]) -> Sequence[Demonstration]:
        rows = self.world.demonstrations(len(train), self.split_seed, split="train", split_seed=self.split_seed)
        return [Demonstration([*row["prompt"], answer_turn(row["response"])], len(row["prompt"])) for row in rows]
