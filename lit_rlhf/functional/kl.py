"""Distances between two policies, in nats, and the coefficient that holds them at a target."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lit_rlhf.functional.masking import masked_sum

Estimator = Literal["k1", "k2", "k3", "full"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: Literal["k1", "k2", "k3"] = "k1") -> Tensor:
    """Estimates of KL(pi || ref), one a sampled token, same shape as ``logprobs`` (Schulman 2020, "Approximating KL").

    With ``d = log pi(a) - log ref(a)``: k1 = ``d``, unbiased, below 0 now and then; k2 = ``d^2 / 2``, biased, small
    variance; k3 = ``exp(-d) - 1 + d``, unbiased and never negative. Expectations are over a ~ pi.

    As a *loss* they behave otherwise, for the derivative does not see how samples depend on the policy: that of k1 is 0
    in expectation, that of k2 is the gradient of KL(pi || ref), that of k3 is the one of KL(ref || pi)."""
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d**2
    return torch.expm1(-d) + d


def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(pi || ref) (...) of the next-token distributions ``logits`` and ``ref_logits`` (..., V), over all V tokens.

    Tokens that are ruled out by both (-inf) add nothing."""
    log_pi, log_ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    ruled_out = log_pi == float("-inf")
    terms = log_pi.exp() * (log_pi.masked_fill(ruled_out, 0.0) - log_ref.masked_fill(ruled_out, 0.0))
    return terms.sum(-1)


def sequence_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """``sum_t log pi(a_t|s_t) - log pi_ref(a_t|s_t)`` of each sampled answer, (B,) in nats.

    The k1 estimator summed over tokens: unbiased when the answers were sampled from pi,
    and below 0 for a single answer now and then. Tensors are (B, T), mask True = response token."""
    return masked_sum(logprobs - ref_logprobs, mask, dim=-1)


def adapted_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: float) -> float:
    """The coefficient after ``episodes`` answers whose mean divergence was ``kl``, in nats *an answer*.

    ``kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon)`` (arXiv:1909.08593, section 2.2): a
    tenth of a change in ``horizon / 2`` episodes at most. Raises ``ValueError`` unless both are above 0."""
    if not (target > 0 and horizon > 0):
        raise ValueError(f"target {target} (nats an answer) and horizon {horizon} (episodes) must be above 0")
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)
