"""Sampling of the next token."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Keep the ``top_k`` most likely tokens (0: all) and of these the fewest of mass ``top_p`` (arXiv:1904.09751).

    ``logits`` (B, V); the others become -inf. The most likely token is always kept.

    >>> logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    >>> filter_logits(logits, top_k=3).softmax(-1)
    tensor([[0.0000, 0.2222, 0.3333, 0.4444]])
    >>> filter_logits(logits, top_p=0.5).softmax(-1)
    tensor([[0.0000, 0.0000, 0.4286, 0.5714]])
    """
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p  # mass before this token already reaches top_p
        beyond[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), float("-inf"))
    return logits


def sample_index(probs: Tensor, generator: Generator | None = None, uniform: Tensor | None = None) -> Tensor:
    """One index (B,) from each row of ``probs`` (B, V), by inverting the cumulative distribution.

    The same distribution as ``torch.multinomial``, at a fraction of its cost for one draw per row. The
    numbers drawn from [0, 1) can be given as ``uniform`` (B,) float64. Raises ``FloatingPointError``
    where a row is no distribution (a NaN: its logits were not finite).

    >>> sample_index(torch.tensor([[0.25, 0.75]]), uniform=torch.tensor([0.3], dtype=torch.float64))
    tensor([1])
    """
    size = probs.shape[-1]
    # Among sqrt(V) blocks first, then within one: sums over V are cheap, running sums over V in float64 are not.
    width = 1 << round(math.log2(size) / 2)
    blocks = (F.pad(probs, (0, -size % width)) if size % width else probs).view(len(probs), -1, width)
    cumulative = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    if not torch.isfinite(cumulative[:, -1]).all():
        raise FloatingPointError("the logits are not finite, so no token can be sampled: the model has diverged")
    if uniform is None:
        uniform = torch.rand(probs.shape[0], generator=generator, dtype=torch.float64, device=probs.device)
    # Scaled by the total, which rounding leaves next to 1, so that the draw never falls past the last possible token.
    target = uniform[:, None] * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, target, right=True).clamp_(max=cumulative.shape[1] - 1)
    before = F.pad(cumulative, (1, 0)).gather(1, block)
    share = (target - before) / (cumulative.gather(1, block) - before)  # of the block's mass, in [0, 1)
    within = blocks[torch.arange(len(probs), device=probs.device), block.squeeze(1)].cumsum(-1, dtype=torch.float64)
    inside = torch.searchsorted(within, share * within[:, -1:], right=True).clamp_(max=width - 1)
    index: Tensor = block * width + inside
    return index.squeeze(1)


def drawn_figures(logits: Tensor, probs: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability, entropy), both (B,) in nats, of tokens ``drawn`` (B,) and of their distributions.

    ``logits`` (B, V) and their softmax ``probs`` (B, V) are both at hand when a token is drawn: neither figure then
    takes another pass of exponentials over the vocabulary.

    >>> probs = torch.tensor([[0.5, 0.25, 0.25]])
    >>> drawn_figures(probs.log(), probs, torch.tensor([0]))  # -log 2 and 1.5 log 2
    (tensor([-0.6931]), tensor([1.0397]))
    """
    logprobs = probs.gather(1, drawn[:, None]).log()
    # sum p (log Z - logit) = log Z - E[logit], where log Z = logit - log p at any token; one ruled out counts 0.
    mean = (probs * logits).sum(-1)
    if not torch.isfinite(mean).all():
        mean = (probs * logits.clamp(min=torch.finfo(logits.dtype).min)).sum(-1)
    entropies = logits.gather(1, drawn[:, None]).squeeze(1) - logprobs.squeeze(1) - mean
    return logprobs.squeeze(1), entropies
