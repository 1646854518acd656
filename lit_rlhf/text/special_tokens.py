"""Special tokens come from a tokenizer or a template; in people's text their names are characters like any others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from lit_rlhf.errors import UserError

# What the name of a special token means in a record: "plain" text; "refuse": an error; "rendered": the token itself,
# because a chat template has written the record already, or a corpus has it between its documents.
SpecialTokens = Literal["plain", "refuse", "rendered"]

HALF = re.compile("[\ud800-\udfff]")


class Pieces(NamedTuple):
    """A text as tokens."""

    tokens: list[int]
    spans: list[tuple[int, int]]  # characters [begin, end) of each; none where the tokenizer is written in Python


def text_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a tokenizer puts in front of a text by itself: ``<bos>`` for many checkpoints, for many none."""
    text, whole = (list(tokenizer("a", add_special_tokens=added)["input_ids"]) for added in (False, True))
    return whole[: next((i for i in range(len(whole)) if whole[i : i + len(text)] == text), 0)]


def unknown_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that stands for characters that a tokenizer cannot write; None: there is none, or it ends texts too."""
    number = tokenizer.unk_token_id
    return None if number in (tokenizer.bos_token_id, tokenizer.eos_token_id) else number


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special_tokens: SpecialTokens = "plain"
) -> list[list[int]]:
    """Tokens of each of ``texts``, nothing in front and nothing behind. Raises ``UserError`` for "refuse"."""
    if special_tokens == "refuse":
        check(special_names(tokenizer), texts)
    plain = special_tokens != "rendered"
    settings = {"add_special_tokens": False, "split_special_tokens": plain, "verbose": False}
    return tokenizer(list(texts), **settings)["input_ids"] if texts else []


def cuts_anywhere(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text has the same tokens alone as behind another: SentencePiece puts a space before the first word."""
    one, two, both = encode_texts(tokenizer, ["\n", "a", "\na"])
    return one + two == both


def encode_behind(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special_tokens: SpecialTokens = "plain"
) -> list[list[int]]:
    """Tokens of each of ``texts`` as it follows another text, whatever that is: those behind a line break's."""
    alone = encode_texts(tokenizer, texts, special_tokens)
    if not texts or cuts_anywhere(tokenizer):
        return alone
    first, *both = encode_texts(tokenizer, ["\n", *(f"\n{text}" for text in texts)], special_tokens)
    count = len(first)
    return [ids[count:] if ids[:count] == first else by_itself for ids, by_itself in zip(both, alone)]


def any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Finds any of ``names``, a longer one before those that it holds; of no names, nothing."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")


class Names:
    """Names of special tokens, found in texts as ``tokenizer`` finds them.

    A token may be looked for in normalized text: "<|IM_END|>", where a normalizer makes small letters of it, is one,
    too. Those are found by reading a text, which takes longer than to search it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: Iterable[str]) -> None:
        self._tokenizer, self._written, names = tokenizer, any_of(names), {*names}
        normalizes = tokenizer.is_fast and tokenizer.backend_tokenizer.normalizer is not None
        added = tokenizer.added_tokens_decoder.items() if normalizes else ()
        self._read = {number for number, token in added if token.normalized and token.content in names}

    def search(self, text: str) -> tuple[int, int] | None:
        """The characters [begin, end) of the first name in ``text``."""
        found = self._written.search(text)
        spans = [found.span()] if found else []
        if self._read:
            spans += [span for token, span in zip(*_encode(self._tokenizer, text)) if token in self._read]
        return min(spans, default=None)


def special_names(tokenizer: PreTrainedTokenizerBase) -> Names:
    """The names of what a tokenizer flags as special tokens."""
    return Names(tokenizer, {t.content for t in tokenizer.added_tokens_decoder.values() if t.special})


def check(names: Names | re.Pattern[str], value: Any) -> None:
    """Raises ``UserError`` where a text in ``value``, a message say, holds one of ``names``."""
    for text in strings(value):
        if found := names.search(text):
            begin, end = found.span() if isinstance(found, re.Match) else found
            name, around = text[begin:end], text[max(0, begin - 30) : end + 30]
            raise UserError(f"a text holds the special token {name!r} ({around!r}), and special_tokens=refuse")


def check_characters(value: Any) -> None:
    """Raises ``UserError`` where a text in ``value`` is not Unicode: half of a pair of surrogates."""
    for text in strings(value):
        if found := HALF.search(text):
            raise UserError(
                f"a text holds half a character ({found[0]!a}), as one does that was cut inside an emoji or is no UTF-8"
            )


def strings(value: Any) -> Iterator[str]:
    """The texts in messages, or in whatever holds texts, names of a tool's arguments too; roles are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        yield from strings([item for key, item in value.items() if key != "role"])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)


def marked(tokenizer: PreTrainedTokenizerBase, names: Names, value: Any) -> tuple[Any, str]:
    """``value`` with a mark written into each of ``names`` in its texts, so that nobody reads them as tokens; the mark.

    The mark is a character that its texts do not hold; "" where there are no such names. :func:`encode_marked` takes it
    out again."""
    if not any(map(names.search, strings(value))):
        return value, ""
    used = set("".join(strings(value)))
    mark = next(c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in used)

    def written(item: Any) -> Any:
        if isinstance(item, dict):
            return {written(key): inner if key == "role" else written(inner) for key, inner in item.items()}
        if isinstance(item, list | tuple):
            return [written(inner) for inner in item]
        return _marked(tokenizer, names, item, mark) if isinstance(item, str) and names.search(item) else item

    return written(value), mark


def _marked(tokenizer: PreTrainedTokenizerBase, names: Names, text: str, mark: str) -> str:
    # Where plain text is cut into tokens anyway, the mark changes none of them.
    cuts = {begin for begin, _ in _encode(tokenizer, text, split_special_tokens=True).spans}
    done, rest = "", text
    while found := names.search(rest):
        before = len(text) - len(rest)
        inside = range(before + found[0] + 1, before + found[1])
        cut = next((i for i in inside if i in cuts), inside.start) - before
        done, rest = done + rest[:cut] + mark, rest[cut:]
    return done + rest


def encode_marked(tokenizer: PreTrainedTokenizerBase, text: str, mark: str) -> Pieces:
    """Tokens of a text that holds marks, without the marks' own: names that have one become plain text where they
    stand, and the special tokens that a template wrote stay what they are."""
    found = _encode(tokenizer, text)
    if not mark or mark not in text:
        return found
    if not found.spans:
        raise UserError(
            "a text holds the name of a special token, which this tokenizer, written in Python, cannot tell from the "
            f"token itself ({text.replace(mark, '')[:80]!r}); take the fast one (tokenizer.json)"
        )
    marks = [i for i, c in enumerate(text) if c == mark]
    own = [any(begin <= i < end for i in marks) for begin, end in found.spans]
    if any(mine and end - begin > 1 for mine, (begin, end) in zip(own, found.spans)):
        raise UserError(f"this tokenizer cannot write the name of a special token as plain text: {text[-80:]!r}")
    kept = [i for i, mine in enumerate(own) if not mine]
    return Pieces([found.tokens[i] for i in kept], [found.spans[i] for i in kept])


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, split_special_tokens: bool = False) -> Pieces:
    settings = {"add_special_tokens": False, "split_special_tokens": split_special_tokens, "verbose": False}
    found = tokenizer(text, return_offsets_mapping=tokenizer.is_fast, **settings)
    return Pieces(found["input_ids"], found["offset_mapping"] if tokenizer.is_fast else [])
