"""How answers are drawn, and what comes of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple, Protocol

import torch
from pydantic import Field
from torch import Generator, Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. All tokens are possible by default: what is learned from must be what was sampled."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 128  # tokens, the one that ends the answer included
    temperature: Annotated[float, Field(ge=0)] = 1.0  # divides the logits; 0 takes the most likely token
    top_k: Annotated[int, Field(ge=0)] = 0  # 0: all tokens
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # 1: all tokens
    min_new_tokens: Annotated[int, Field(ge=0)] = 0  # tokens before an answer can end
    stop: Sequence[str] = ()  # texts before which an answer ends, besides the end tokens

    def greedy(self) -> Sampling:
        """The same limits, always taking the most likely token."""
        return Sampling(self.max_new_tokens, 0.0, min_new_tokens=self.min_new_tokens, stop=self.stop)


class Responses(NamedTuple):
    """B sampled answers of up to T tokens."""

    tokens: Tensor  # (B, T) int64, the one that ended the answer included, padding after it
    mask: Tensor  # (B, T) bool, True = token of the answer
    logprobs: Tensor  # (B, T) float32, nats, under the distribution that was sampled from; 0 at masked positions
    entropy: Tensor  # (B, T) float32, nats, of that distribution, NaN where unknown; 0 at masked positions
    finished: Tensor  # (B,) bool, False = cut off at max_new_tokens
    stop: Sequence[str] = ()  # texts before which an answer ends
    states: Tensor | None = None  # (B, T, E) hidden states that the tokens were drawn from, where asked for
    ends: Collection[int] = ()  # tokens with which an answer ends; special ones are no part of its text anyway

    @property
    def lengths(self) -> Tensor:
        """Tokens (B,) of each answer."""
        return self.mask.sum(-1)

    def token_lists(self) -> list[list[int]]:
        """Each answer's token ids, without padding; with those that write the stop text that ended it."""
        return [row[:n] for row, n in zip(self.tokens.tolist(), self.lengths.tolist())]

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Each answer as a person reads it: without special and end tokens, stop texts and space around it."""
        said = [tokens[:-1] if tokens[-1:] and tokens[-1] in self.ends else tokens for tokens in self.token_lists()]
        texts = tokenizer.batch_decode(said, skip_special_tokens=True)
        return [before_stop(text, self.stop).strip() for text in texts]


class Engine(Protocol):
    """What samples for a stage: ``answer``, or a partial of it, or :class:`VLLMEngine`.

    Where an attribute ``exact`` is there and False, the log-probs are not those of a training pass. Of an exact one PPO
    with a critic on the policy also asks for ``states=True``: see ``Responses.states``."""

    def __call__(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        generator: Generator | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> Responses:
        """One answer to each of ``prompts`` (B token lists), whose random numbers are its own; see ``generate``."""
        ...


def before_stop(text: str, stop: Sequence[str]) -> str:
    """``text`` up to the first of the texts in ``stop``."""
    return text[: min((text.index(s) for s in stop if s in text), default=len(text))]


def seeds(answers: int, generator: Generator | None, shard: tuple[int, int]) -> list[int]:
    """One for each answer of this process, out of those of all: an answer's random numbers are its own."""
    rank, ranks = shard
    device = "cpu" if generator is None else generator.device
    return torch.randint(2**31, (answers * ranks,), generator=generator, device=device)[rank::ranks].tolist()
