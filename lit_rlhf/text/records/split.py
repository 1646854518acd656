"""One split by prompt for all stages, so that no prompt of the test set was seen in training."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from lit_rlhf.errors import UserError
from lit_rlhf.text.records.messages import Message, Messages, text_of

Record = TypeVar("Record")


def prompt_key(messages: Sequence[Message]) -> str:
    """The prompt as one unambiguous string."""
    return json.dumps([[m["role"], text_of(m)] for m in messages], ensure_ascii=False)


def normalized_key(messages: Sequence[Message]) -> str:
    """:func:`prompt_key`, the same for prompts that differ in case, in spaces, in Unicode's spellings or in the system
    message only."""
    turns = [
        {"role": m["role"], "content": " ".join(unicodedata.normalize("NFKC", text_of(m)).casefold().split())}
        for m in messages
        if m["role"] not in ("system", "developer")
    ]
    return prompt_key(turns)


def split_marks(messages: Sequence[Message], seed: int) -> tuple[int, float]:
    """(:func:`prompt_fingerprint` as a number, :func:`split_place`) of a prompt."""
    key = normalized_key(messages)
    digests = [hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8] for text in (key, f"{seed}\n{key}")]
    fingerprint, place = (int.from_bytes(digest, "big") for digest in digests)
    return fingerprint, place / 2**64


def prompt_fingerprint(messages: Sequence[Message]) -> str:
    """16 hex digits of :func:`normalized_key`."""
    return f"{split_marks(messages, 0)[0]:016x}"


def split_place(messages: Sequence[Message], seed: int) -> float:
    """Position of a prompt in the split, from 0 to 1, by its :func:`normalized_key` and the seed alone."""
    return split_marks(messages, seed)[1]


def is_held_out(messages: Sequence[Message], fraction: float, seed: int, fold: int = 0) -> bool:
    """Whether a prompt belongs to the held-out part; with another ``fold`` it is another part, apart from the first.

    It depends on the prompt's text and the seed alone: the same prompt falls on the same side in every stage and file.
    """
    return fold * fraction <= split_place(messages, seed) < (fold + 1) * fraction


@dataclass
class Moved:
    """Prompts, by their fingerprints, that are not where :func:`is_held_out` has them, since one side was empty.

    A run keeps it for all its stages; in a notebook, data modules of prompts that overlap may share one."""

    held_out: set[str] = field(default_factory=set)
    train: set[str] = field(default_factory=set)
    trained: set[str] = field(default_factory=set)  # was trained on by some stage: is not held out by any other
    trained_by: list[str] = field(default_factory=list, compare=False)  # those stages
    or_else: str = field(default="", compare=False)  # what else the stage's user may do where all were trained on
    kept: int = 0  # records that the latest split would hold out, but for that

    def change_sides(self, places: dict[str, float], all_held: bool, fraction: float, fold: int = 0) -> set[str]:
        """Where all prompts are held out, or none is: the fingerprints that are instead, of ``places`` (fingerprint ->
        :func:`split_place`).

        Those nearest to the threshold change sides: as many as the fraction asks for, one at least. Raises
        ``UserError`` where that cannot be."""
        size = min(max(1, round(fraction * len(places))), len(places) - 1)
        if size < 1:
            raise UserError("there is one distinct prompt, and to hold one out takes two; give more prompts")
        if all_held:
            return places.keys() - self.train_on_some(places, fraction, fold)
        others = {p: place for p, place in places.items() if p not in self.trained}
        found = {*_by_distance(others, fraction, fold, last=self.train)[:size]}
        if not found:
            by = f" ({', '.join(self.trained_by)})" if self.trained_by else ""
            raise UserError(
                f"all {len(places)} prompts were trained on by earlier stages{by}, so that none can be held out; add "
                f"prompts that are new to the models (one is enough){self.or_else}"
            )
        self.held_out |= found
        self.train -= found
        return found

    def train_on_some(self, places: dict[str, float], fraction: float, fold: int = 0) -> set[str]:
        """Of prompts that are all held out, those that are trained on instead: all but the fraction, one at least."""
        size = max(1, round(fraction * len(places)))
        found = {*_by_distance(places, fraction, fold, last=self.held_out)[: max(1, len(places) - size)]}
        self.train |= found
        self.held_out -= found
        return found


def _by_distance(places: dict[str, float], fraction: float, fold: int, last: set[str]) -> list[str]:
    """Fingerprints by their places' distance from the threshold, those in ``last`` behind the others."""
    edges = [fraction] if fold == 0 else [fold * fraction, (fold + 1) * fraction]
    return sorted(places, key=lambda p: (p in last, min(abs(places[p] - edge) for edge in edges), p))


def split_by_prompt(
    records: Sequence[Record],
    prompt: Callable[[Record], Messages],
    fraction: float,
    seed: int,
    fold: int = 0,
    moved: Moved | None = None,
) -> tuple[list[Record], list[Record]]:
    """(train, held out) by :func:`is_held_out`, but for the prompts in ``moved``, to which those are added that have to
    change sides. Raises ``UserError`` where there is one distinct prompt, or no such fold."""
    marks = [split_marks(prompt(record), seed) for record in records]
    prints, places = np.array([mark[0] for mark in marks], np.uint64), np.array([mark[1] for mark in marks])
    held = held_out_mask(prints, places, fraction, fold, moved)
    return [r for r, out in zip(records, held) if not out], [r for r, out in zip(records, held) if out]


def held_out_mask(
    prints: np.ndarray, places: np.ndarray, fraction: float, fold: int = 0, moved: Moved | None = None
) -> np.ndarray:
    """Which of N records are held out, (N,) bool, by the :func:`split_marks` of their prompts, (N,) uint64 and float;
    as :func:`split_by_prompt` does it."""
    if (fold + 1) * fraction > 1 + 1e-9:
        raise UserError(f"fold={fold}: held_out={fraction:g} makes {int(1 / fraction + 1e-9)} folds, counted from 0")
    moved = Moved() if moved is None else moved
    held = (fold * fraction <= places) & (places < (fold + 1) * fraction) | np.isin(prints, _numbers(moved.held_out))
    held &= ~np.isin(prints, _numbers(moved.train))
    trained = held & np.isin(prints, _numbers(moved.trained))
    held, moved.kept = held & ~trained, int(trained.sum())
    if fraction == 0 or 0 < held.sum() < len(held):
        return held
    known = by_fingerprint(prints, places)
    return np.isin(prints, _numbers(moved.change_sides(known, bool(held.all()), fraction, fold)))


def by_fingerprint(prints: np.ndarray, places: np.ndarray) -> dict[str, float]:
    """:func:`split_place` of each :func:`prompt_fingerprint`."""
    return {f"{number:016x}": place for number, place in zip(prints.tolist(), places.tolist())}


def _numbers(fingerprints: set[str]) -> np.ndarray:
    return np.array([int(each, 16) for each in fingerprints], np.uint64)
