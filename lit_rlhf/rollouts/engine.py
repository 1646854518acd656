"""Drawing responses from a policy: requests in, responses out. Where generation runs is the engine's own affair."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.arguments import checked
from lit_rlhf.errors import NotFinite, UserError
from lit_rlhf.models.finite import finite
from lit_rlhf.models.gathering import whole
from lit_rlhf.models.policy import context_length

# Far from 1 all tokens are as likely as each other, or logits overflow.
Temperature = Annotated[float, Field(ge=0.01, le=100)] | Annotated[float, Field(ge=0, le=0)]


@checked
@dataclass(frozen=True)
class Sampling:
    """Sampling settings. All tokens are possible by default: what is learned from must be what was sampled."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 128  # tokens, the one that ends the response included
    temperature: Temperature = 1.0  # divides the logits; 0 takes the most likely token
    top_k: Annotated[int, Field(ge=0)] = 0  # 0: all tokens
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # 1: all tokens
    min_new_tokens: Annotated[int, Field(ge=0)] = 0  # tokens before a response can end
    stop: Sequence[Annotated[str, Field(min_length=1)]] = ()  # texts before which a response ends, besides end tokens

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", tuple(self.stop))  # requests are grouped by it
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(f"min_new_tokens={self.min_new_tokens} is more than max_new_tokens={self.max_new_tokens}")

    def greedy(self) -> Sampling:
        """The same limits, always taking the most likely token."""
        return Sampling(self.max_new_tokens, 0.0, min_new_tokens=self.min_new_tokens, stop=self.stop)


class Request(NamedTuple):
    """One response that is asked for."""

    prompt: Sequence[int]  # token ids, one or more
    sampling: Sampling
    seed: int  # of the response's random numbers: no other response changes them


class Ended(IntEnum):
    """Why a response ended."""

    LENGTH = 0  # cut off at max_new_tokens
    TOKEN = 1  # by an end token
    STOP = 2  # by a text of ``Sampling.stop``


class Response(NamedTuple):
    """One response of n tokens."""

    tokens: list[int]
    logprobs: list[float]  # nats
    entropy: list[float]  # nats
    ended: Ended


class Responses(NamedTuple):
    """B sampled responses of up to T tokens, in the order of their requests."""

    tokens: Tensor  # (B, T) int64, the one that ended the response included, padding after it
    mask: Tensor  # (B, T) bool, True = token of the response
    logprobs: Tensor  # (B, T) float32, nats, under the distribution that was sampled from; 0 at masked positions
    entropy: Tensor  # (B, T) float32, nats, of that distribution, NaN where unknown; 0 at masked positions
    ended: Tensor  # (B,) int64, an ``Ended`` each
    stops: Sequence[Sequence[str]] = ()  # B times the texts before which the response ends
    ends: Collection[int] = ()  # end tokens; special ones are no part of a text anyway
    version: int = 0  # of the weights
    states: Tensor | None = None  # (B, T, E) hidden states that the tokens were drawn from, where asked for

    @property
    def finished(self) -> Tensor:
        """Whether each ended by itself, (B,) bool; False = cut off at ``max_new_tokens``."""
        return self.ended != Ended.LENGTH

    @property
    def lengths(self) -> Tensor:
        """Tokens (B,) of each response."""
        return self.mask.sum(-1)

    def token_lists(self) -> list[list[int]]:
        """Each response's token ids, without padding; with those that write the stop text that ended it."""
        return [row[:n] for row, n in zip(self.tokens.tolist(), self.lengths.tolist())]

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Each response as a person reads it: without special and end tokens, stop texts and space around it."""
        own = [tokens[:-1] if tokens[-1:] and tokens[-1] in self.ends else tokens for tokens in self.token_lists()]
        texts = tokenizer.batch_decode(own, skip_special_tokens=True)
        return [before_stop(text, stop).strip() for text, stop in zip(texts, self.stops or [()] * len(texts))]


class Engine(Protocol):
    """Protocol of a rollout engine, which generates responses.

    :class:`FastEngine`, :class:`TransformersEngine`, :class:`VLLMEngine`, or your own. Two attributes may say more:
    ``reads_shards``, whether ``sync`` takes sharded weights as they are (False without it: it gets whole ones), and
    ``settings``, from which ``stage=plan`` takes ``rows`` and ``cache_gib`` (without it one row is planned)."""

    exact: bool  # whether log-probs are those of a training pass in the policy's precision, up to rounding
    gives_states: bool  # whether ``generate`` can return ``Responses.states``

    def sync(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
        """Take over the weights of ``policy`` as they are now; returns their version, one more than the last."""
        ...

    def generate(self, requests: Sequence[Request], *, states: bool = False) -> Responses:
        """One response to each request by the policy that was handed over last.

        Raises ``UserError`` where a prompt and its response do not fit into the model's context."""
        ...


def sample(
    engine: Engine,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int] | Generator | None = None,
    *,
    states: bool = False,
) -> Responses:
    """One response of ``policy``, as it is now, to each of ``prompts`` (B token lists).

    Of a sharded policy all processes sample together: the engine finds it whole, or gathers it itself where it has the
    attribute ``reads_shards``. ``seeds`` (B,), or the generator that they are drawn from; None: PyTorch's own. Raises
    :class:`lit_rlhf.errors.NotFinite` where the model says no finite numbers."""
    seeds = draw_seeds(len(prompts), seeds) if seeds is None or isinstance(seeds, Generator) else seeds
    requests = [Request(prompt, sampling, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    try:
        with nullcontext() if getattr(engine, "reads_shards", False) else whole(policy):
            engine.sync(policy, tokenizer)
            responses = engine.generate(requests, states=states)
    except FloatingPointError as error:
        raise NotFinite(str(error)) from None
    finite(responses.logprobs, "the log-probs of sampled tokens")
    return responses


def draw_seeds(
    count: int, generator: Generator | None = None, shard: tuple[int, int] = (0, 1), together: int = 1
) -> list[int]:
    """Seeds of the ``count`` responses of this rank; ``shard`` is (rank, number of ranks).

    A seed depends on the response's place in the whole batch alone. ``together`` consecutive responses, those to one
    prompt say, stay on one rank."""
    rank, ranks = shard
    device = "cpu" if generator is None else generator.device
    drawn = torch.randint(2**31, (count * ranks,), generator=generator, device=device)
    return drawn.view(-1, together)[rank::ranks].flatten().tolist()


def by_sampling(
    requests: Sequence[Request], draw: Callable[[Sampling, list[Request]], Responses], pad_id: int
) -> Responses:
    """``draw`` for the requests of each sampling settings together; the responses in the order of ``requests``."""
    groups: dict[Sampling, list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault(request.sampling, []).append(i)
    parts = [draw(sampling, [requests[i] for i in members]) for sampling, members in groups.items()]
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([i for members in groups.values() for i in members]).argsort()
    width = max(part.tokens.shape[1] for part in parts)

    def joined(name: str, fill: int = 0) -> Tensor:
        tables = [getattr(part, name) for part in parts]
        wide = [F.pad(t, (0, 0) * (t.dim() - 2) + (0, width - t.shape[1]), value=fill) for t in tables]
        return torch.cat(wide)[order]

    return parts[0]._replace(
        tokens=joined("tokens", pad_id),
        mask=joined("mask"),
        logprobs=joined("logprobs"),
        entropy=joined("entropy"),
        ended=torch.cat([part.ended for part in parts])[order],
        stops=[request.sampling.stop for request in requests],
        states=None if parts[0].states is None else joined("states"),
    )


def padded_responses(
    responses: Sequence[Response],
    requests: Sequence[Request],
    pad_id: int,
    ends: Collection[int],
    version: int,
    device: torch.device,
) -> Responses:
    """Responses that were drawn one by one, padded on the right."""

    def padded(rows: Sequence[Sequence[float]], fill: int, dtype: torch.dtype) -> Tensor:
        tensors = [torch.tensor(row, dtype=dtype) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=fill).to(device)

    tokens, logprobs, entropy, ended = zip(*responses)
    return Responses(
        padded(tokens, pad_id, torch.int64),
        padded([[1] * len(row) for row in tokens], 0, torch.bool),
        padded(logprobs, 0, torch.float32),
        padded(entropy, 0, torch.float32),
        torch.tensor(ended, device=device),
        [request.sampling.stop for request in requests],
        ends,
        version,
    )


def check_room(model: PreTrainedModel, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    """Raise ``UserError`` where prompt and response do not fit into the model's context."""
    longest, limit = max(map(len, prompts)), sampling.max_new_tokens
    if longest + limit > context_length(model):
        raise UserError(
            f"a prompt of {longest} tokens and {limit} new ones (sampling.max_new_tokens) do not fit "
            f"into the model's context of {context_length(model)}; shorten one of them, or skip long prompts"
        )


def before_stop(text: str, stop: Sequence[str]) -> str:
    """``text`` up to the first of the texts in ``stop``."""
    return text[: min((text.index(s) for s in stop if s in text), default=len(text))]
