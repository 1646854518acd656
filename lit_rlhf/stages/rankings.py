"""Rankings, packed, every answer of a prompt in one batch: what reward model and DPO have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import accumulate, chain, combinations, compress
from operator import attrgetter
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from lit_rlhf.errors import UserError
from lit_rlhf.functional import pair_accuracy, ranking_loss, ranking_pairs
from lit_rlhf.models.policy import predicting_positions, response_positions
from lit_rlhf.stages.examples import ExampleDataModule
from lit_rlhf.stages.prompts import Judge
from lit_rlhf.stages.supervised import SupervisedModule
from lit_rlhf.stages.world import WithoutRecordSettings
from lit_rlhf.text.chat import encode_prompts, encode_responses
from lit_rlhf.text.packing import Packed, pack
from lit_rlhf.text.records import Messages, Ranking, parse_ranking, shown, text_of
from lit_rlhf.text.special_tokens import SpecialTokens
from lit_rlhf.text.world import World


class RankingBatch(NamedTuple):
    """All answers of some prompts."""

    packed: Packed  # N sequences: prompt and answer, with the answers' lengths
    ranks: Tensor  # (N,) int64, 1 = best
    prompt_index: Tensor  # (N,) int64, which prompt an answer belongs to
    learned: Tensor  # (M,) int64, flat indices of the response tokens of each prompt's best-ranked answers
    predicting: Tensor  # (M,) int64, of the tokens that predict them
    share: float  # prompts of this micro-batch that have a pair, over the average of the step's micro-batches
    pair_share: float  # pairs, likewise
    learned_share: float  # tokens in ``learned``, likewise
    gold: Tensor | None  # (N,) float, grades by the gold judge, where there is one
    ratings: Tensor  # (N,) float, 0 to 1, of answers whose prompt has no pair but feedback; NaN: none
    rated_share: float  # rated answers of this micro-batch, over the average of the step's micro-batches
    margins: Tensor | None = None  # (N,) float, the scores of two answers are to differ by the difference of theirs
    kinds: tuple[str, ...] = ()  # of each prompt
    annotators: tuple[str, ...] = ()  # of each prompt


class EncodedRanking(NamedTuple):
    """One prompt's answers, as tokens."""

    sequences: list[list[int]]  # prompt and answer, one per answer
    response_lengths: list[int]  # tokens of each answer, which end its sequence
    ranks: list[int]
    gold: list[float] | None
    ratings: list[float]  # NaN where an answer is not learned from alone
    kind: str  # of prompt, "" where nobody says
    annotator: str
    margins: list[float] | None = None


@dataclass(eq=False, repr=False, kw_only=True)
class RankingDataModule(ExampleDataModule):
    """Rankings or pairs from a file.

    Args:
        path: a file, a folder, a pattern (``data/*.jsonl``), a Hub name, or a list of them: rankings, or pairs
            ``chosen`` / ``rejected`` (whole transcripts, too).
        tokenizer: one that is ready, or a function that trains one on the texts.
        batch_size: prompts per process and step.
        max_length: tokens of prompt and answer; longer ones are handled as ``on_long`` says, and counted.
        on_long: "cut" drops the beginning of the prompt, "skip" leaves the ranking out.
        packing: lay sequences one after another (they do not see each other); False: pad a batch to its longest.
        share_prompts: lay a prompt down once for all its answers: the same scores from fewer tokens.
        held_out: fraction of the prompts kept for validation.
        split_seed: which ones; the same in every stage.
        fold: which fraction of them, for cross-validation: with ``held_out=0.2`` 0 to 4.
        special_tokens: what their names mean in the records: "plain" text; "refuse": a bad record; "rendered": tokens,
            as prompt and answers were written by a chat template already, and none is applied.
        seed: order of the prompts.
        limit: train on at most so many rankings, to try things out; None: all.
        weights: share of each entry of ``path`` in what is trained on; None: each ranking is read once in an epoch.
        cache: the folder that keeps records and tokens, which may then be more than memory holds; None: in memory.
        on_bad_record: "fail" names the first bad record, one that the template refuses too; "skip" counts them.
        fields: our name of a field -> its name in the file ("a.b": ``b`` inside ``a``), where it has others.
    """

    batch_size: Annotated[int, Field(ge=1)] = 8
    share_prompts: bool = True
    fold: Annotated[int, Field(ge=0)] = 0
    special_tokens: SpecialTokens = "plain"

    judge: ClassVar[Judge | None] = None
    parse_record, asked = staticmethod(parse_ranking), attrgetter("prompt")
    called, example = "rankings", EncodedRanking
    counts = (*ExampleDataModule.counts, "alike", "tied")

    def rankings(self) -> Sequence[Ranking]:
        """All rankings."""
        return self.load(self.path, self.parse_record)

    def sides(self, rankings: Sequence[Ranking]) -> tuple[Sequence[Ranking], Sequence[Ranking]]:
        """(train, held out)."""
        return self.split(rankings)

    def records(self) -> tuple[Sequence[Ranking], Sequence[Ranking]]:
        return self.sides(self.rankings())

    def texts(self, records: Sequence[Ranking]) -> Iterator[str]:
        yield from (text_of(message) for ranking in records for message in ranking.prompt)
        yield from (text for ranking in records for text in ranking.responses)

    def encode(self) -> None:
        self.alike: list[str] = []  # where rankings stand, and what they say, whose answers are the same to a model
        self.tied: list[str] = []  # or of one rank, which no ratings tell apart
        super().encode()

    def check_left(self, what: str, train: Sequence[Any] | None, held_out: Sequence[Any]) -> None:
        whys = (
            ("are the same tokens, of which none is better", self.alike),
            ("share a rank, so none is better", self.tied),
        )
        lines = [
            f"{self.source}: {len(found)} rankings are left out, for their answers {why} (the first: {found[0]})"
            for why, found in whys
            if found
        ]
        if lines and not (train and held_out):
            raise UserError(f"{lines[-1]}; none is left to {'test' if train else 'train'} on")
        for line in lines:
            self.note(line)
        super().check_left(what, train, held_out)

    def trained_prompts(self) -> Iterator[Messages]:
        """The prompts whose answers are learned from."""
        yield from (ranking.prompt for ranking in self.train_records[: self.limit])

    def encoded(self, rankings: Sequence[Ranking], held_out: bool) -> list[EncodedRanking]:
        refused: dict[int, str] = {}
        owners = [i for i, r in enumerate(rankings) for _ in r.responses]
        before = encode_prompts(
            self.tokenizer, [r.prompt for r in rankings], [r.tools for r in rankings],
            special_tokens=self.special_tokens, refuse=refused.setdefault, note=self.note,
        )  # fmt: skip
        responses = iter(
            encode_responses(
                self.tokenizer, [rankings[i].prompt for i in owners], [turn for r in rankings for turn in r.turns],
                [rankings[i].tools for i in owners], special_tokens=self.special_tokens, note=self.note,
                refuse=lambda i, reason: refused.setdefault(owners[i], reason),
            )
        )  # fmt: skip
        encoded = []
        for i, (ranking, prompt) in enumerate(zip(rankings, before)):
            answered = [next(responses) for _ in ranking.responses]
            alike = len(answered) > 1 and len({*map(tuple, answered)}) == 1
            if reason := refused.get(i) or (None if alike else _same_tokens(ranking, answered)):
                self.refuse(ranking, reason)
                continue
            tied = len(answered) > 1 and len(set(ranking.ranks)) == 1 and not ranking.ratings
            if alike or tied:  # of a score less itself there is no gradient, nor any of a pair that is none
                texts = " and ".join(repr(text[:30]) for text in ranking.responses[:2])
                which = self.alike if alike else self.tied
                which.append(f"{ranking.place or shown(ranking.prompt)[:60]}, {texts}")
                continue
            sequences = [[*prompt, *answer] for answer in answered]
            too_long = any(len(s) > self.max_length for s in sequences)
            self.long += too_long
            if too_long and self.on_long == "skip":
                continue
            gold = None
            if held_out and self.judge is not None:
                gold = [self.judge.grade(ranking.prompt, text).gold for text in ranking.responses]
            # At least one token of the prompt stays in front: it predicts the answer's first.
            lengths = [min(len(answer), self.max_length - 1) for answer in answered]
            alone = ranking.ratings if ranking.ratings and len(set(ranking.ranks)) == 1 else [math.nan] * len(answered)
            kind = str(ranking.lineage.get("kind", ""))
            cut = [s[-self.max_length :] for s in sequences]
            encoded.append(
                EncodedRanking(cut, lengths, ranking.ranks, gold, alone, kind, ranking.annotator, ranking.margins)
            )
        return encoded

    def sequences(self, item: EncodedRanking) -> list[list[int]]:
        return item.sequences

    def collate(self, items: Sequence[EncodedRanking], mine: list[int], everyones: list[int]) -> RankingBatch:
        """The items ``mine`` of this micro-batch, out of ``everyones`` of the optimizer step."""
        chosen, all_of = [items[i] for i in mine], [items[i] for i in everyones]

        def share(count: Callable[[EncodedRanking], int]) -> float:
            average = sum(map(count, all_of)) * len(mine) / len(everyones)
            return sum(map(count, chosen)) / max(average, 1e-9)

        lengths = [n for item in chosen for n in item.response_lengths]
        sequences = [s for item in chosen for s in item.sequences]
        packed = pack(sequences, self.tokenizer.pad_token_id, lengths, self.share_prompts, padded=not self.packing)
        ratings = [rating for item in chosen for rating in item.ratings]
        best = torch.tensor([good for item in chosen for good in _worth_imitating(item)])
        positions, mask = response_positions(packed)
        before, _ = predicting_positions(packed)
        learned = mask & best[:, None]
        return RankingBatch(
            packed,
            torch.tensor([rank for item in chosen for rank in item.ranks]),
            torch.tensor([i for i, item in enumerate(chosen) for _ in item.ranks]),
            positions[learned],
            before[learned],
            share(lambda item: len(set(item.ranks)) > 1),
            share(lambda item: sum(a != b for a, b in combinations(item.ranks, 2))),
            share(lambda item: sum(compress(item.response_lengths, _worth_imitating(item)))),
            torch.tensor([g for item in chosen for g in item.gold]) if chosen[0].gold is not None else None,
            torch.tensor(ratings),
            share(lambda item: sum(not math.isnan(rating) for rating in item.ratings)),
            _margins(chosen),
            tuple(item.kind for item in chosen),
            tuple(item.annotator for item in chosen),
        )


@dataclass(eq=False, repr=False)
class WorldRankingDataModule(WithoutRecordSettings, RankingDataModule):
    """Rankings of the built-in world's prompts, split as the world splits them, with its gold judge."""

    world: World
    _: KW_ONLY
    batch_size: Annotated[int, Field(ge=1)] = 24

    max_length: ClassVar[int] = 1024
    on_long: ClassVar[str] = "cut"
    fold: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.judge = self.world

    def sides(self, rankings: list[Ranking]) -> tuple[list[Ranking], list[Ranking]]:
        held = {p.text for p in self.world.prompts("held_out", self.split_seed)}
        try:
            texts = [self.world.question(r.prompt).text for r in rankings]
        except ValueError as error:  # people talk with a model about anything
            said = f"{self.source}: {error} Rankings of any prompts are read by reward/data=collected"
            raise UserError(said) from None
        return (
            [r for r, text in zip(rankings, texts) if text not in held],
            [r for r, text in zip(rankings, texts) if text in held],
        )


class RankedAnswers(NamedTuple):
    """All N answers of a validation."""

    scores: Tensor  # (N,)
    ranks: Tensor  # (N,) int64, 1 = best
    prompt_index: Tensor  # (N,) int64, which prompt an answer belongs to
    lengths: Tensor  # (N,) int64, tokens
    ratings: Tensor  # (N,) as in :class:`RankingBatch`
    gold: Tensor | None  # (N,) grades by the gold judge, where there is one
    kinds: list[str]  # of each prompt
    annotators: list[str]  # of each prompt

    @classmethod
    def of(cls, scores: Tensor, batch: RankingBatch) -> RankedAnswers:
        """The answers of a batch, with their scores (N,)."""
        ranks, owner, lengths = batch.ranks, batch.prompt_index, batch.packed.response_lengths
        return cls(scores, ranks, owner, lengths, batch.ratings, batch.gold, list(batch.kinds), list(batch.annotators))

    @classmethod
    def together(cls, parts: Sequence[RankedAnswers]) -> RankedAnswers:
        """The answers of several batches, with consecutive prompt numbers."""
        scores, ranks, owners, lengths, ratings, gold, kinds, annotators = zip(*parts)
        firsts = accumulate(map(len, kinds), initial=0)
        owner = torch.cat([owner + first for owner, first in zip(owners, firsts)])
        grades = None if gold[0] is None else torch.cat(gold)
        return cls(
            torch.cat(scores), torch.cat(ranks), owner, torch.cat(lengths), torch.cat(ratings), grades,
            [*chain(*kinds)], [*chain(*annotators)],
        )  # fmt: skip


class RankingModule(SupervisedModule):
    """A module that is validated by how it orders held-out answers."""

    def __init__(self, *settings: Any) -> None:
        super().__init__(*settings)
        self._val_pairs = 0  # of the last validation

    def worth(self, batch: RankingBatch) -> Tensor:
        """Scores (N,) by which answers are ordered."""
        raise NotImplementedError

    def examined(self, batch: RankingBatch, dataloader_idx: int) -> RankedAnswers:
        return RankedAnswers.of(self.worth(batch), batch)

    def held_out_metrics(self) -> dict[str, Tensor]:
        """Over all held-out pairs together, each pair once."""
        return self.metrics_of(RankedAnswers.together(self.held_out))

    def metrics_of(self, held_out: RankedAnswers) -> dict[str, Tensor]:
        """``loss`` in nats per pair, the mean over prompts; ``accuracy`` over the annotator's pairs; ``gold_accuracy``
        over the gold judge's, where there are any."""
        scores, pairs = held_out.scores, ranking_pairs(held_out.ranks, held_out.prompt_index)
        self._val_pairs = len(pairs.better)
        metrics = {"loss": ranking_loss(scores, pairs), "accuracy": pair_accuracy(scores, pairs)}
        if held_out.gold is not None:
            graded = ranking_pairs(-held_out.gold, held_out.prompt_index)
            metrics |= {"gold_accuracy": pair_accuracy(scores, graded)} if graded.prompts else {}
        return metrics

    def figures(self) -> dict[str, Any]:
        """Headline figures, from the last validation."""
        metrics = self.trainer.callback_metrics
        gold = metrics.get(f"val/{self.stage}/gold_accuracy")
        return {
            "val_loss": metrics[f"val/{self.stage}/loss"].item(),
            "val_accuracy": metrics[f"val/{self.stage}/accuracy"].item(),
            "gold_accuracy": None if gold is None else gold.item(),
            "val_pairs": self._val_pairs,
        }


def _margins(items: list[EncodedRanking]) -> Tensor | None:
    """(N,) of all answers, 0 where a ranking says nothing; None where none does."""
    if all(item.margins is None for item in items):
        return None
    return torch.tensor([m for item in items for m in item.margins or [0.0] * len(item.ranks)])


def _worth_imitating(item: EncodedRanking) -> list[bool]:
    """Which answers are ranked best; one that was rated alone is where it was liked."""
    return [rank == min(item.ranks) and not rating <= 0.5 for rank, rating in zip(item.ranks, item.ratings)]


def _same_tokens(ranking: Ranking, answered: Sequence[Sequence[int]]) -> str | None:
    """Why nothing can be learned of a ranking: answers that are ranked differently are the same to a model."""
    seen: dict[tuple[int, ...], int] = {}
    for i, tokens in enumerate(answered):
        first = seen.setdefault(tuple(tokens), i)
        one, other = ranking.responses[first], ranking.responses[i]
        if ranking.ranks[first] != ranking.ranks[i]:
            return f"the answers {one[:60]!r} and {other[:60]!r} become the same tokens, and are ranked differently"
    return None
