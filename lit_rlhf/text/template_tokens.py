"""The tokens of what a chat template has written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from lit_rlhf.text.special_tokens import (
    Pieces,
    SpecialTokens,
    cuts_anywhere,
    encode_marked,
    encode_texts,
    text_start,
    unknown_token,
)


class Written(NamedTuple):
    """A prompt, and the answer to it where there is one, as the template writes them."""

    prompt: str
    response: str = ""  # up to the end of the assistant's turn
    learned: list[tuple[int, int]] | None = None  # characters of the response; None: all
    mark: str = ""  # see lit_rlhf.text.special_tokens.marked


class WrittenTokens:
    """Encodes prompts, and responses as they follow them.

    Args:
        tokenizer: of the template.
        special_tokens: "rendered": a prompt is one text, and begins as the tokenizer begins one.
        say: gets a line where the tokenizer cannot write a text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, special_tokens: SpecialTokens, say: Callable[[str], None]
    ) -> None:
        self.tokenizer, self.special_tokens, self._say = tokenizer, special_tokens, say
        self._unknown = unknown_token(tokenizer)

    def prompts(self, written: Sequence[Written]) -> list[list[int]]:
        """Tokens of each prompt."""
        prompts = self._encode([w.prompt for w in written], [w.mark for w in written])
        self._check(prompts)
        start = text_start(self.tokenizer) if self.special_tokens == "rendered" else []
        return [tokens if tokens[: len(start)] == start else [*start, *tokens] for tokens in prompts]

    def responses(self, written: Sequence[Written]) -> list[Pieces]:
        """Tokens of each response behind its prompt."""
        if self._cuts_anywhere and all(w.learned is None for w in written):
            found = self._encode([w.response for w in written], [w.mark for w in written])
            pieces = [Pieces(tokens, []) for tokens in found]
        else:
            pieces = [self._behind(w) for w in written]
        self._check(piece.tokens for piece in pieces)
        return pieces

    def _check(self, found: Iterable[list[int]]) -> None:
        if self._unknown is not None and any(self._unknown in tokens for tokens in found):
            self._say(
                f"the tokenizer cannot write some characters of the texts: {self.tokenizer.unk_token!r} stands for "
                "each, and texts that differ in them alone are the same to the model"
            )

    def _encode(self, texts: Sequence[str], marks: Sequence[str]) -> list[list[int]]:
        plain = iter(encode_texts(self.tokenizer, [t for t, mark in zip(texts, marks) if not mark], "rendered"))
        return [encode_marked(self.tokenizer, t, mark).tokens if mark else next(plain) for t, mark in zip(texts, marks)]

    @cached_property
    def _cuts_anywhere(self) -> bool:
        return cuts_anywhere(self.tokenizer)

    def _behind(self, written: Written) -> Pieces:
        """Tokens of a response as they follow the prompt's, or, where the two share a token, a line break's."""
        if self._cuts_anywhere:
            return encode_marked(self.tokenizer, written.response, written.mark)
        for before in (written.prompt, "\n"):
            first = encode_marked(self.tokenizer, before, written.mark).tokens
            both = encode_marked(self.tokenizer, before + written.response, written.mark)
            if both.tokens[: len(first)] == first:
                spans = [(begin - len(before), end - len(before)) for begin, end in both.spans[len(first) :]]
                return Pieces(both.tokens[len(first) :], spans)
        return encode_marked(self.tokenizer, written.response, written.mark)
