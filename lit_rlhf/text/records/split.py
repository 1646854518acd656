"""One split by prompt for all stages, so that no prompt of the test set was seen in training."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

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


def prompt_fingerprint(messages: Sequence[Message]) -> str:
    """16 hex digits of :func:`normalized_key`."""
    return hashlib.sha256(normalized_key(messages).encode(errors="surrogatepass")).hexdigest()[:16]


def split_place(messages: Sequence[Message], seed: int) -> float:
    """Where a prompt stands between 0 and 1, by its :func:`normalized_key` and the seed alone."""
    digest = hashlib.sha256(f"{seed}\n{normalized_key(messages)}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


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
    trained: set[str] = field(default_factory=set)  # was trained on by some stage: is never moved out of training

    def sides(self, places: dict[str, float], fraction: float, fold: int = 0) -> set[str]:
        """The fingerprints that are held out, of ``places`` (fingerprint -> :func:`split_place`).

        Where one side would be empty, the prompts nearest to the threshold change sides: as many as the fraction asks
        for, one at least. Raises ``UserError`` where that cannot be."""
        low, high = fold * fraction, (fold + 1) * fraction
        held = {p for p, x in places.items() if (low <= x < high or p in self.held_out) and p not in self.train}
        size = min(max(1, round(fraction * len(places))), len(places) - 1)
        if fraction == 0 or 0 < len(held) < len(places):
            return held
        if size < 1:
            raise UserError("there is one distinct prompt, and to hold one out takes two; give more prompts")
        edges = [high] if fold == 0 else [low, high]

        def nearest(prints: set[str], count: int, last: set[str]) -> set[str]:
            return set(sorted(prints, key=lambda p: (p in last, min(abs(places[p] - e) for e in edges), p))[:count])

        if held:  # all of them
            found = nearest(held, len(places) - size, self.held_out)
            self.train |= found
            self.held_out -= found
            return held - found
        found = nearest(places.keys() - self.trained, size, self.train)
        if not found:
            raise UserError(
                f"all {len(places)} prompts were trained on by earlier stages, so that none can be held out; give "
                "prompts that are new to the models"
            )
        self.held_out |= found
        self.train -= found
        return found


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
    if (fold + 1) * fraction > 1 + 1e-9:
        raise UserError(f"fold={fold}: held_out={fraction:g} makes {int(1 / fraction + 1e-9)} folds, counted from 0")
    prompts = [prompt(record) for record in records]
    prints = [prompt_fingerprint(messages) for messages in prompts]
    places = {p: split_place(messages, seed) for p, messages in dict(zip(prints, prompts)).items()}
    held = (Moved() if moved is None else moved).sides(places, fraction, fold)
    sides = list(zip(records, prints))
    return [r for r, p in sides if p not in held], [r for r, p in sides if p in held]
