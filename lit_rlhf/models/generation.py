"""The rollout engine: sampling from transformers' causal language models, with log-probs of what was sampled.

Answers that end leave the batch, so that no step is spent on them, and token ids and log-probs are kept as they are
drawn: nothing is decoded and tokenized again, and no second forward pass is needed to know how likely an answer was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Generator, Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.functional import filter_logits, position_ids, sample_token, token_entropy, token_logprobs
from lit_rlhf.models.policy import context_length, next_token_logits
from lit_rlhf.text.chat import encode_prompts
from lit_rlhf.text.packing import left_pad
from lit_rlhf.text.records import Messages


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. All tokens are possible by default: what is learned from must be what was sampled."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 48  # tokens, end-of-text included
    temperature: Annotated[float, Field(ge=0)] = 1.0  # divides the logits; 0 takes the most likely token
    top_k: Annotated[int, Field(ge=0)] = 0  # 0: all tokens
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # 1: all tokens

    def greedy(self) -> Sampling:
        """The same limits, always taking the most likely token."""
        return Sampling(self.max_new_tokens, temperature=0.0)


class Responses(NamedTuple):
    """B sampled answers of up to T tokens."""

    tokens: Tensor  # (B, T) int64, end-of-text included, padding after it
    mask: Tensor  # (B, T) bool, True = token of the answer
    logprobs: Tensor  # (B, T) float32, nats, under the distribution that was sampled from; 0 at masked positions
    entropy: Tensor  # (B, T) float32, nats, of that distribution; 0 at masked positions
    finished: Tensor  # (B,) bool, False = cut off at max_new_tokens

    @property
    def lengths(self) -> Tensor:
        """Tokens (B,) of each answer."""
        return self.mask.sum(-1)

    def token_lists(self) -> list[list[int]]:
        """Each answer's token ids, without padding."""
        return [row[:n] for row, n in zip(self.tokens.tolist(), self.lengths.tolist())]

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Each answer as a person reads it: without special tokens and without space around it."""
        return [text.strip() for text in tokenizer.batch_decode(self.token_lists(), skip_special_tokens=True)]


def answer(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    generator: Generator | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Responses:
    """:func:`generate` with the tokenizer's end-of-text and padding."""
    ends = {"eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}
    return generate(policy, prompts, sampling, **ends, generator=generator, shard=shard)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    eos_id: int,
    pad_id: int,
    generator: Generator | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Responses:
    """Sample one answer to each of ``prompts`` (B token lists of any lengths).

    Each answer has random numbers of its own, which depend on the generator and on the answer's place in the batch
    alone: not on when others end, nor, with ``shard`` = (rank, number of ranks), on how a batch is dealt out to ranks.
    Runs under ``no_grad`` rather than inference mode, whose tensors fail in a later backward pass. Raises
    ``UserError`` where prompt and answer do not fit into the model's context."""
    shape = len(prompts), sampling.max_new_tokens
    out_tokens = torch.full(shape, pad_id, device=model.device)
    out_mask = torch.zeros(shape, dtype=torch.bool, device=model.device)
    out_logprobs = torch.zeros(shape, device=model.device)
    out_entropy = torch.zeros(shape, device=model.device)
    used = 0
    for rows, drawn, logits in _draw(model, prompts, sampling, eos_id, pad_id, generator, shard):
        out_tokens[rows, used] = drawn
        out_mask[rows, used] = True
        out_logprobs[rows, used] = token_logprobs(logits, drawn)
        out_entropy[rows, used] = token_entropy(logits)
        used += 1
    finished = (out_tokens == eos_id).any(-1)
    return Responses(out_tokens[:, :used], out_mask[:, :used], out_logprobs[:, :used], out_entropy[:, :used], finished)


class Growing(NamedTuple):
    """An answer while it is written."""

    text: str  # all of it so far, as a person reads it
    finished: bool  # the model has ended it; False in the last one means that it was cut off at max_new_tokens


def stream(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    sampling: Sampling,
    generator: Generator | None = None,
    stop: Sequence[str] = (),
) -> Iterator[Growing]:
    """The answer to ``messages``, after each token; in the end it is that of :func:`answer` from the same generator.

    It also ends before the first of the texts in ``stop``, of which no part is shown. A character of which some bytes
    are still to come is held back."""
    [prompt] = encode_prompts(tokenizer, [messages])
    eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    tokens: list[int] = []
    text = ""
    for _, drawn, _ in _draw(policy, [prompt], sampling, eos_id, pad_id, generator):
        tokens.append(int(drawn))
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if found := [text.index(s) for s in stop if s in text]:
            yield Growing(text[: min(found)].strip(), True)
            return
        if tokens[-1] != eos_id and len(tokens) < sampling.max_new_tokens:
            yield Growing(_without_begun(text.rstrip("\ufffd"), stop).strip(), False)
    yield Growing(_without_begun(text, stop).strip(), tokens[-1] == eos_id)


def _without_begun(text: str, stop: Sequence[str]) -> str:
    """Without an end that may be the beginning of a stop text."""
    begun = [n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])]
    return text[: len(text) - max(begun, default=0)]


class _Drawn(NamedTuple):
    """The next token of each answer that has not ended."""

    rows: Tensor  # (A,) int64, places of these answers in the batch
    tokens: Tensor  # (A,) int64
    logits: Tensor  # (A, V) float32 of the distribution that was sampled from


@torch.no_grad()
def _draw(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    eos_id: int,
    pad_id: int,
    generator: Generator | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[_Drawn]:
    """Token after token of :func:`generate`, until all answers have ended."""
    longest = max(map(len, prompts))
    if longest + sampling.max_new_tokens > context_length(model):
        raise UserError(
            f"a prompt of {longest} tokens and {sampling.max_new_tokens} new ones (sampling.max_new_tokens) do not fit "
            f"into the model's context of {context_length(model)}; shorten one of them, or skip long prompts"
        )
    device = model.device
    tokens, mask = (x.to(device) for x in left_pad(prompts, pad_id))
    batch, steps = len(prompts), sampling.max_new_tokens
    rank, ranks = shard
    uniforms = torch.rand(batch * ranks, steps, generator=generator, dtype=torch.float64, device=device)[rank::ranks]
    alive = torch.arange(batch, device=device)  # rows that are still being written
    cache = DynamicCache(config=model.config)
    positions = position_ids(mask)
    # Elsewhere transformers makes it: eager attention adds numbers, and a sliding window sees less.
    own_mask = model.config._attn_implementation == "sdpa" and getattr(model.config, "sliding_window", None) is None
    for step in range(steps):
        hidden = model.base_model(
            input_ids=tokens,
            attention_mask=_step_mask(mask, tokens.shape[1]) if own_mask else mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        logits = _shape_logits(next_token_logits(model, hidden).float(), sampling)
        drawn = logits.argmax(-1) if sampling.temperature == 0 else sample_token(logits, uniform=uniforms[alive, step])
        yield _Drawn(alive, drawn, logits)
        going = drawn != eos_id
        if not going.any():
            return
        if not going.all():
            keep = going.nonzero().squeeze(1)
            alive, drawn, mask, positions = alive[keep], drawn[keep], mask[keep], positions[keep]
            cache.batch_select_indices(keep)
        tokens = drawn[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1


def _step_mask(mask: Tensor, width: int) -> Tensor:
    """Boolean attention mask (B, 1, width, S) for the last ``width`` of S positions: real tokens, none ahead.

    Made here, once a step: transformers builds it in every forward pass from general parts, at more than its cost."""
    size = mask.shape[1]
    columns = torch.arange(size, device=mask.device)
    causal = columns <= columns[size - width :, None]
    allowed = causal & mask[:, None, None, :]
    # A padding position sees itself, so that its softmax is not empty (0 / 0); nobody sees it.
    return allowed | (columns == columns[size - width :, None]) if width > 1 else allowed


def _shape_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    if sampling.temperature not in (0.0, 1.0):
        logits = logits / sampling.temperature
    return filter_logits(logits, sampling.top_k, sampling.top_p)
