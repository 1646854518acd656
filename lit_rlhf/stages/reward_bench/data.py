"""Questions with a chosen and one or more rejected answers, by subset."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from lit_rlhf.stages.records import RecordDataModule
from lit_rlhf.text.records import Ranking, parse_ranking
from lit_rlhf.text.special_tokens import Names, SpecialTokens
from lit_rlhf.training.batches import BatchLoader, dealing, in_order

BESIDE = ("id", "chosen_model", "rejected_model", "models", "num_correct", "num_incorrect", "total_completions")


class BenchQuestion(NamedTuple):
    """A question of a benchmark; answers of rank 1 are the right ones."""

    ranking: Ranking
    subset: str  # "all" where a record names none
    place: str = ""  # file and line


def parse_question(row: dict[str, Any]) -> BenchQuestion:
    """``prompt``, ``chosen``, ``rejected`` and ``subset``; lists of answers, too, as in RewardBench 2."""
    subset = str(row.get("subset") or "all")
    for name in BESIDE:  # known, and not needed
        row.get(name)
    sides = [row.get("chosen"), row.get("rejected")]
    lists = [[side] if isinstance(side, str) else side for side in sides]
    several = any(isinstance(side, list) for side in sides)
    if several and all(isinstance(side, list) and all(isinstance(text, str) for text in side) for side in lists):
        chosen, rejected = lists
        prompt = {} if row.get("prompt") is None else {"prompt": row.get("prompt")}
        row = {**prompt, "responses": [*chosen, *rejected], "ranks": [1] * len(chosen) + [2] * len(rejected)}
    ranking = parse_ranking(row)
    if len(set(ranking.ranks)) == 1:
        raise ValueError("none of its answers is the better one; a chosen and another, rejected one were expected")
    return BenchQuestion(ranking, subset)


@dataclass(eq=False, repr=False, kw_only=True)
class RewardBenchDataModule(RecordDataModule):
    """All questions of files; none is trained on.

    Args:
        path: a file, a folder, a pattern (``data/*.jsonl``), a Hub name, or a list of them: ``prompt``, ``chosen``,
            ``rejected``, ``subset``.
        tokenizer: of the reward model, whose special tokens ``special_tokens`` is about; None: it is asked by text.
        batch_size: questions per batch.
        limit: at most so many questions, to try things out; None: all.
        special_tokens: what their names mean in the records: "plain" text; "refuse": a bad record; "rendered": tokens.
        on_bad_record: "fail" names the first bad record, "skip" counts them.
        fields: our name of a field -> its name in the file ("a.b": ``b`` inside ``a``), where it has others.
    """

    tokenizer: PreTrainedTokenizerBase | None = field(default=None, kw_only=False)  # type: ignore[assignment]
    batch_size: Annotated[int, Field(ge=1)] = 32
    special_tokens: SpecialTokens = "plain"

    held_out: ClassVar[float] = 1.0
    split_seed: ClassVar[int] = 0
    seed: ClassVar[int] = 0
    cache: ClassVar[None] = None
    parse_record = staticmethod(parse_question)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.questions: Sequence[BenchQuestion] = []

    def setup(self, stage: str | None = None) -> None:
        if not self.questions:
            questions = self.load(self.path, parse_question)[: self.limit]
            self.check_fields()
            self.questions = self.allowed(questions, lambda q: [q.ranking.prompt, q.ranking.turns, q.ranking.tools])

    def special_names(self) -> Names | re.Pattern[str]:
        if self.tokenizer is not None:
            return super().special_names()
        from lit_rlhf.stages.endpoint import CONTROL  # its client takes a while to import

        return CONTROL  # what the server's own may be is not known

    def sizes(self) -> dict[str, int]:
        return {"questions": len(self.questions)}

    def for_module(self) -> dict[str, Any]:
        return {**super().for_module(), "special_tokens": self.special_tokens, "note": self.note}

    def transfer_batch_to_device(self, batch: list[BenchQuestion], *_: Any) -> list[BenchQuestion]:
        """Questions are text."""
        return batch

    def test_dataloader(self) -> BatchLoader[list[BenchQuestion]]:
        collate = lambda mine, _: [self.questions[i] for i in mine]  # noqa: E731
        return BatchLoader(
            in_order(len(self.questions)), self.batch_size, collate, keep_rest=True, **dealing(self.trainer)
        )
