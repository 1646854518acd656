"""Distances between two policies, in nats, and the coefficient that holds them at a target."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lit_rlhf.functional.masking import check_choice, check_shapes, masked_sum

Estimator = Literal["k1", "k2", "k3", "full"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: Literal["k1", "k2", "k3"] = "k1") -> Tensor:
    """Estimates of KL(pi || ref), one per sampled token, in the shape of ``logprobs`` (Schulman 2020).

    With ``d = log pi(a) - log ref(a)``: k1 = ``d``, unbiased, below 0 now and then; k2 = ``d^2 / 2``, biased, small
    variance; k3 = ``exp(-d) - 1 + d``, unbiased and never negative. Expectations are over a ~ pi.

    As a *loss* they behave otherwise, for the derivative does not see how samples depend on the policy: that of k1 is 0
    in expectation, that of k2 is the gradient of KL(pi || ref), that of k3 is the one of KL(ref || pi).

    >>> logprobs, ref_logprobs = torch.tensor([0.5, 0.1]).log(), torch.tensor([0.25, 0.2]).log()
    >>> kl_estimate(logprobs, ref_logprobs)  # log 2 and -log 2
    tensor([ 0.6931, -0.6931])
    >>> kl_estimate(logprobs, ref_logprobs, "k3")
    tensor([0.1931, 0.3069])
    """
    check_shapes(logprobs=logprobs, ref_logprobs=ref_logprobs)
    check_choice("estimator", estimator, ("k1", "k2", "k3"))
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d**2
    return torch.expm1(-d) + d


def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(pi || ref) (...) of the next-token distributions ``logits`` and ``ref_logits`` (..., V), over all V tokens.

    Tokens that are ruled out by both (-inf) add nothing.

    >>> full_kl(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log())  # log(2) / 2 + log(2 / 3) / 2
    tensor(0.1438)
    """
    check_shapes(logits=logits, ref_logits=ref_logits)
    log_pi, log_ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    ruled_out = log_pi == float("-inf")
    terms = log_pi.exp() * (log_pi.masked_fill(ruled_out, 0.0) - log_ref.masked_fill(ruled_out, 0.0))
    return terms.sum(-1)


def sequence_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """``sum_t log pi(a_t|s_t) - log pi_ref(a_t|s_t)`` of each sampled answer, (B,) in nats.

    The k1 estimator summed over tokens: unbiased when the answers were sampled from pi,
    and below 0 for a single answer now and then. Tensors are (B, T), mask True = response token.

    >>> logprobs = torch.tensor([[-1.0, -2.0, -9.0]])
    >>> sequence_kl(logprobs, torch.tensor([[-1.5, -3.0, 0.0]]), torch.tensor([[True, True, False]]))
    tensor([1.5000])
    """
    check_shapes(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    return masked_sum(logprobs - ref_logprobs, mask, dim=-1)


def adapted_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: float) -> float:
    """The coefficient after ``episodes`` answers whose mean divergence was ``kl``, in nats *per answer*.

    ``kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon)`` (arXiv:1909.08593, section 2.2): a
    tenth of a change in ``horizon / 2`` episodes at most. Raises ``ValueError`` unless both are above 0.

    >>> adapted_kl_coef(0.05, kl=12.0, target=6.0, episodes=100, horizon=1000.0)  # twice the target: 2% more
    0.051000000000000004
    """
    if not (target > 0 and horizon > 0):
        raise ValueError(f"target {target} (nats per answer) and horizon {horizon} (episodes) must be above 0")
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)
