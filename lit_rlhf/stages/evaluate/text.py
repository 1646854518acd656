"""How well a model predicts held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.functional import ratio
from lit_rlhf.models.chunked import token_logprobs_of
from lit_rlhf.models.micro_batches import tokens_at_once
from lit_rlhf.models.policy import context_length
from lit_rlhf.text.packing import stream
from lit_rlhf.text.special_tokens import encode_texts, text_start


class TextNats(NamedTuple):
    """Negative log-likelihoods of R rows of text."""

    nats: Tensor  # (R,) of all tokens, separators included
    tokens: Tensor  # (R,)
    of_text: float  # nats of the documents' own tokens, without the separators between them


Batches = Sequence[Tensor]
ReadAll = Callable[[Batches, Callable[[Tensor], list[Tensor]]], list[list[Tensor]]]


def one_by_one(batches: Batches, read: Callable[[Tensor], list[Tensor]]) -> list[list[Tensor]]:
    """Read all items in one process."""
    return [read(batch) for batch in batches]


@torch.no_grad()
def text_nats(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    row_length: int,
    read_all: ReadAll = one_by_one,
) -> TextNats:
    """The rows into which ``documents`` are cut, one behind the other as in pretraining, the first behind a separator.

    Rows of ``row_length`` tokens, or of the model's context where that is shorter; the last one is what is left. Where
    the tokenizer begins a text with a token (``<bos>``), each row stands behind it, which is not counted. ``read_all``
    has the batches read, in order."""
    ids, start, end = encode_texts(tokenizer, documents), text_start(tokenizer), tokenizer.eos_token_id
    tokens = stream([[*start, *document] for document in ids], end)[len(start) :].long().to(policy.device)
    # By place rather than by number: a document may hold the separator's token itself.
    own = stream([[*[0] * len(start), *[1] * len(document)] for document in ids], 0)[len(start) :].bool()
    seen = len(start) or 1  # tokens before the first that is predicted
    length = min(row_length, context_length(policy) - seen + 1)
    before = torch.tensor(start or [end], device=policy.device)
    rows = [
        torch.cat([before if start or not i else tokens[i - 1 : i], tokens[i : i + length]])
        for i in range(0, len(tokens), length)
    ]

    def read(batch: Tensor) -> list[Tensor]:
        hidden = policy.base_model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state[:, seen - 1 :]
        return [row.clone() for row in -token_logprobs_of(policy, hidden, batch[:, seen:]).double().cpu()]

    batches = _batches(rows, max(1, min(64, tokens_at_once(policy, learning=False) // length)))
    nats = [row for found in read_all(batches, read) for row in found]
    sums = torch.stack([row.sum() for row in nats])
    counts = torch.tensor([len(row) for row in nats], dtype=torch.float64)
    return TextNats(sums, counts, torch.cat(nats)[own].sum().item())


def _batches(rows: Sequence[Tensor], size: int) -> list[Tensor]:
    """Rows of equal length together; the last row may be shorter."""
    full = [row for row in rows if len(row) == len(rows[0])]
    return [torch.stack(full[i : i + size]) for i in range(0, len(full), size)] + [r[None] for r in rows[len(full) :]]


def text_figures(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    row_length: int,
    read_all: ReadAll = one_by_one,
) -> dict[str, Any]:
    """Perplexity, ``exp(nats per token)``, with its 95% interval (rows resampled), and bits per byte of the documents.

    Separators between documents are tokens to be predicted, and have no bytes: the perplexity counts them, the bits do
    not. Models with different tokenizers are comparable by the latter alone."""
    nats, tokens, of_text = text_nats(policy, tokenizer, documents, row_length, read_all)
    estimate = ratio(nats, tokens)
    return {
        "perplexity": math.exp(estimate.value),
        "low": math.exp(estimate.low),
        "high": math.exp(estimate.high),
        "rows": estimate.n,
        "tokens": int(tokens.sum()),
        "bits_per_byte": of_text / math.log(2) / sum(len(text.encode()) for text in documents),
    }
