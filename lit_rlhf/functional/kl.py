"""Distance from the reference policy, in nats."""

from __future__ import annotations

from torch import Tensor

from lit_rlhf.functional.masking import masked_sum


def sequence_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """``sum_t log pi(a_t|s_t) - log pi_ref(a_t|s_t)`` of each sampled answer, (B,) in nats.

    The k1 estimator (Schulman, "Approximating KL divergence"): unbiased when the answers were sampled from pi,
    and below 0 for a single answer now and then. Tensors are (B, T), mask True = response token."""
    return masked_sum(logprobs - ref_logprobs, mask, dim=-1)
