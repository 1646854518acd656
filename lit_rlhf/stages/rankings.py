"""Rankings, packed, every answer of a prompt in one batch: what reward model and DPO have in common."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.functional import pair_accuracy, ranking_loss, ranking_pairs
from lit_rlhf.models import predicting_positions, response_positions
from lit_rlhf.stages.prompts import Judge
from lit_rlhf.stages.records import Paths, RecordDataModule
from lit_rlhf.text.chat import encode_prompts, encode_responses, ensure_chat_template
from lit_rlhf.text.packing import Packed, pack
from lit_rlhf.text.records import Messages, OnBadRecord, Ranking, parse_ranking, shown, text_of
from lit_rlhf.text.special_tokens import SpecialTokens
from lit_rlhf.text.tokenizer import TokenizerTrainer
from lit_rlhf.text.world import World
from lit_rlhf.training import ExampleDataModule


class RankingBatch(NamedTuple):
    """All answers of some prompts."""

    packed: Packed  # N sequences: prompt and answer, with the answers' lengths
    ranks: Tensor  # (N,) int64, 1 = best
    prompt_index: Tensor  # (N,) int64, which prompt an answer belongs to
    learned: Tensor  # (M,) int64, flat indices of the response tokens of each prompt's best-ranked answers
    predicting: Tensor  # (M,) int64, of the tokens that predict them
    share: float  # prompts of this micro-batch that have a pair, over the average of the step's micro-batches
    gold: Tensor | None  # (N,) float, grades by the gold judge, where there is one
    ratings: Tensor  # (N,) float, 0 to 1, of answers whose prompt has no pair but feedback; NaN: none
    rated_share: float  # rated answers of this micro-batch, over the average of the step's micro-batches
    margins: Tensor | None = None  # (N,) float, the scores of two answers are to differ by the difference of theirs
    kinds: tuple[str, ...] = ()  # of each prompt
    annotators: tuple[str, ...] = ()  # of each prompt


class Judged(NamedTuple):
    """What is known of the answers to one prompt, K each."""

    ranks: list[int]
    response_lengths: list[int]  # tokens
    gold: list[float] | None
    kind: str
    annotator: str


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


class RankingDataModule(RecordDataModule, ExampleDataModule):
    """Rankings or pairs from a file.

    Args:
        path: a file, a pattern (``data/*.jsonl``), a Hub name, or a list of them: rankings, or pairs
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
        on_bad_record: "fail" names the first bad record, one that the template refuses too; "skip" counts them.
        fields: our name of a field -> its name in the file ("a.b": ``b`` inside ``a``), where it has others.
    """

    judge: Judge | None = None
    parse_record = staticmethod(parse_ranking)

    def __init__(
        self,
        path: Paths,
        tokenizer: PreTrainedTokenizerBase | TokenizerTrainer,
        *,
        batch_size: Annotated[int, Field(ge=1)] = 8,
        max_length: Annotated[int, Field(ge=2)] = 1024,
        on_long: Literal["skip", "cut"] = "cut",
        packing: bool = True,
        share_prompts: bool = True,
        held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1,
        split_seed: int = 0,
        fold: Annotated[int, Field(ge=0)] = 0,
        special_tokens: SpecialTokens = "plain",
        seed: int = 0,
        limit: Annotated[int, Field(ge=1)] | None = None,
        on_bad_record: OnBadRecord = "fail",
        fields: dict[str, str] | None = None,
    ) -> None:
        super().__init__(
            path, fields=fields, held_out=held_out, split_seed=split_seed, fold=fold, on_bad_record=on_bad_record
        )  # fmt: skip
        self.limit, self._tokenizer, self.special_tokens = limit, tokenizer, special_tokens
        self.batch_size, self.max_length, self.on_long, self.packing = batch_size, max_length, on_long, packing
        self.share_prompts, self.seed = share_prompts, seed
        self.train_set: list[EncodedRanking] = []
        self.alike: list[Ranking] = []  # rankings of answers that are the same to a model

    def records(self) -> list[Ranking]:
        """All rankings."""
        return self.load(self.path, self.parse_record)

    def sides(self, rankings: list[Ranking]) -> tuple[list[Ranking], list[Ranking]]:
        """(train, held out)."""
        return self.split(rankings, lambda r: r.prompt)

    def setup(self, stage: str | None = None) -> None:
        if self.train_set:
            return
        self.train_rankings, self.val_rankings = self.sides(self.records())
        self.tokenizer = (
            self._tokenizer
            if isinstance(self._tokenizer, PreTrainedTokenizerBase)
            else self._tokenizer(_texts(self.train_rankings))
        )
        ensure_chat_template(self.tokenizer)
        self.encode()

    def encode(self) -> None:
        self.long, self.alike = 0, []
        self.train_set = self._encode(self.train_rankings[: self.limit])
        self.val_set = self._encode(self.val_rankings, graded=True)
        if self.alike:
            first = self.alike[0]
            line = (
                f"{self.source}: {len(self.alike)} rankings are left out, for their answers are the same tokens, of "
                f"which none is better (the first: {first.place or shown(first.prompt)[:60]}, "
                f"{' and '.join(repr(text[:30]) for text in first.responses[:2])})"
            )
            if not (self.train_set and self.val_set):
                raise UserError(f"{line}; none is left to {'test' if self.train_set else 'train'} on")
            self.note(line)
        self.check_left("answers", self.train_set, self.val_set)

    def longest(self) -> int:
        return max(len(sequence) for item in [*self.train_set, *self.val_set] for sequence in item.sequences)

    def trained_prompts(self) -> Iterator[Messages]:
        """The prompts whose answers are learned from."""
        yield from (ranking.prompt for ranking in self.train_rankings[: self.limit])

    def _encode(self, rankings: list[Ranking], graded: bool = False) -> list[EncodedRanking]:
        refused: dict[int, str] = {}
        owners = [i for i, r in enumerate(rankings) for _ in r.responses]
        before = encode_prompts(
            self.tokenizer, [r.prompt for r in rankings], [r.tools for r in rankings],
            special_tokens=self.special_tokens, refuse=refused.setdefault, note=self.note,
        )  # fmt: skip
        responses = iter(
            encode_responses(
                self.tokenizer, [rankings[i].prompt for i in owners], [text for r in rankings for text in r.responses],
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
            if alike:  # of a score less itself there is no gradient
                self.alike.append(ranking)
                continue
            sequences = [[*prompt, *answer] for answer in answered]
            too_long = sum(len(s) > self.max_length for s in sequences)
            self.long += too_long
            if too_long and self.on_long == "skip":
                continue
            gold = None
            if graded and self.judge is not None:
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

    def tokens(self, item: EncodedRanking) -> int:
        return sum(map(len, item.sequences))

    def collate(self, items: list[EncodedRanking], mine: list[int], everyones: list[int]) -> RankingBatch:
        """The items ``mine`` of this micro-batch, out of ``everyones`` of the optimizer step."""
        chosen = [items[i] for i in mine]
        with_pairs = sum(len(set(items[i].ranks)) > 1 for i in everyones) * len(mine) / len(everyones)
        own = sum(len(set(item.ranks)) > 1 for item in chosen)
        lengths = [n for item in chosen for n in item.response_lengths]
        sequences = [s for item in chosen for s in item.sequences]
        packed = pack(sequences, self.tokenizer.pad_token_id, lengths, self.share_prompts, padded=not self.packing)
        ratings = [rating for item in chosen for rating in item.ratings]
        rated = _rated(items[i] for i in everyones) * len(mine) / len(everyones)
        # An answer that was rated alone is worth imitating where it was liked.
        best = [rank == min(item.ranks) for item in chosen for rank in item.ranks]
        best = torch.tensor([good and not rating <= 0.5 for good, rating in zip(best, ratings)])
        positions, mask = response_positions(packed)
        before, _ = predicting_positions(packed)
        learned = mask & best[:, None]
        return RankingBatch(
            packed,
            torch.tensor([rank for item in chosen for rank in item.ranks]),
            torch.tensor([i for i, item in enumerate(chosen) for _ in item.ranks]),
            positions[learned],
            before[learned],
            own / max(with_pairs, 1e-9),
            torch.tensor([g for item in chosen for g in item.gold]) if chosen[0].gold is not None else None,
            torch.tensor(ratings),
            _rated(chosen) / max(rated, 1e-9),
            _margins(chosen),
            tuple(item.kind for item in chosen),
            tuple(item.annotator for item in chosen),
        )


class WorldRankingDataModule(RankingDataModule):
    """Rankings of the built-in world's prompts, split as the world splits them, with its gold judge."""

    def __init__(
        self,
        path: Paths,
        tokenizer: PreTrainedTokenizerBase,
        world: World,
        *,
        batch_size: Annotated[int, Field(ge=1)] = 24,
        packing: bool = True,
        share_prompts: bool = True,
        split_seed: int = 0,
        seed: int = 0,
        limit: Annotated[int, Field(ge=1)] | None = None,
    ) -> None:
        super().__init__(
            path,
            tokenizer,
            batch_size=batch_size,
            packing=packing,
            share_prompts=share_prompts,
            split_seed=split_seed,
            seed=seed,
            limit=limit,
        )
        self.world = world
        self.judge = world

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


class Ranked(NamedTuple):
    """How scores order held-out answers."""

    loss: Tensor  # nats per pair, the mean over prompts
    accuracy: Tensor  # fraction of the annotator's pairs
    gold_accuracy: Tensor | None  # fraction of the gold judge's pairs, where there are any
    pairs: int  # that the annotator did not tie


def ranked(scored: list[tuple[Tensor, RankingBatch]]) -> Ranked:
    """All pairs of all batches together, each once; with each batch come the scores (N,) of its answers."""
    counts = [int(batch.prompt_index.max()) + 1 for _, batch in scored]
    prompt_index = torch.cat([b.prompt_index + sum(counts[:i]) for i, (_, b) in enumerate(scored)])
    scores, batches = torch.cat([s for s, _ in scored]), [batch for _, batch in scored]
    pairs = ranking_pairs(torch.cat([b.ranks for b in batches]), prompt_index)
    gold = None
    if batches[0].gold is not None:
        graded = ranking_pairs(-torch.cat([b.gold for b in batches]), prompt_index)
        gold = pair_accuracy(scores, graded) if graded.prompts else None
    return Ranked(ranking_loss(scores, pairs), pair_accuracy(scores, pairs), gold, len(pairs.better))


def judged_prompts(batch: RankingBatch) -> list[Judged]:
    """A batch prompt by prompt."""
    counts = batch.prompt_index.bincount().tolist()
    ranks, lengths = batch.ranks.split(counts), batch.packed.response_lengths.split(counts)
    gold = [None] * len(counts) if batch.gold is None else [grades.tolist() for grades in batch.gold.split(counts)]
    return [
        Judged(ranks[i].tolist(), lengths[i].tolist(), gold[i], batch.kinds[i], batch.annotators[i])
        for i in range(len(counts))
    ]


def _margins(items: list[EncodedRanking]) -> Tensor | None:
    """(N,) of all answers, 0 where a ranking says nothing; None where none does."""
    if all(item.margins is None for item in items):
        return None
    return torch.tensor([m for item in items for m in item.margins or [0.0] * len(item.ranks)])


def _rated(items: Iterable[EncodedRanking]) -> int:
    """Answers that are learned from alone."""
    return sum(not math.isnan(rating) for item in items for rating in item.ratings)


def _same_tokens(ranking: Ranking, answered: Sequence[Sequence[int]]) -> str | None:
    """Why nothing can be learned of a ranking: answers that are ranked differently are the same to a model."""
    seen: dict[tuple[int, ...], int] = {}
    for i, tokens in enumerate(answered):
        first = seen.setdefault(tuple(tokens), i)
        one, other = ranking.responses[first], ranking.responses[i]
        if one != other and ranking.ranks[first] != ranking.ranks[i]:
            return f"the answers {one[:60]!r} and {other[:60]!r} become the same tokens, and are ranked differently"
    return None


def _texts(rankings: list[Ranking]) -> list[str]:
    return [
        *(text_of(m) for r in rankings for m in r.prompt),
        *(text for r in rankings for text in r.responses),
    ]
