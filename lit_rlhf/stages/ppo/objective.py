"""The objective of PPO on a minibatch of a rollout, and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.functional import clip_fraction, clipped_value_loss, kl_estimate, masked_mean, whole_answer
from lit_rlhf.models.batching import Batching
from lit_rlhf.models.chunked import by_token, token_logprobs_of
from lit_rlhf.models.finite import blame
from lit_rlhf.models.heads import Critic
from lit_rlhf.models.policy import packed_hidden
from lit_rlhf.models.reference import Reference
from lit_rlhf.models.responses import Responding, scatter
from lit_rlhf.stages.ppo.kl import KLPenalty, logprob_and_kl
from lit_rlhf.stages.ppo.loss import PolicyLoss
from lit_rlhf.stages.ppo.rollout import Rollout
from lit_rlhf.text.packing import Packed

Losses = tuple[Tensor, Tensor, dict[str, Tensor]]  # the policy's, the critic's, what is to be watched


@dataclass
class Objective:
    """Losses of policy and critic, means over the actions."""

    policy: PreTrainedModel
    reference: Reference
    critic: Critic | None
    loss: PolicyLoss
    kl: KLPenalty
    kl_coef: Tensor  # () reward units per nat
    value_clip_range: float | None  # reward units
    value_coef: float  # weight of the critic's loss
    temperature: float
    action: Literal["token", "answer"]
    batching: Batching
    tokens_per_pass: int  # at most, in a backward pass

    def gradients(
        self,
        minibatch: Rollout,
        share: Tensor | float,
        read: Callable[[Callable[[], Losses]], Losses],
        backward: Callable[[Tensor, bool], None],
    ) -> dict[str, Tensor]:
        """Adds the gradients of a minibatch to those there are, micro-batch by micro-batch.

        ``read`` calls what reads the models; ``backward`` takes a loss, and whether it is the last one; ``share``
        weights them all, and what is returned to be watched, but for the largest ``ratio``."""
        parts = self.micro_batches(minibatch)
        watched: dict[str, Tensor] = {}
        for i, (part, weight) in enumerate(parts):
            policy_loss, value_loss, seen = read(partial(self.losses, part))
            # One backward pass of the sum serves policy and critic, apart or on one backbone (and DDP).
            loss = (policy_loss + self.value_coef * value_loss) * share * weight
            ratio = torch.maximum(seen.pop("ratio"), watched.get("ratio", loss.detach().new_zeros(())))
            for name, value in seen.items():
                watched[name] = watched.get(name, 0.0) + value * weight * share
            watched |= {"loss": watched.get("loss", 0.0) + loss.detach(), "ratio": ratio}
            backward(loss, i == len(parts) - 1)
        return watched

    def micro_batches(self, minibatch: Rollout) -> list[tuple[Rollout, float]]:
        """(a part that a backward pass may take, its share of the actions): gradients of the parts, weighted so, add up
        to those of the whole."""
        order = self.batching.by_prompt(minibatch.sequences, minibatch.response_mask)
        ordered = minibatch.select(torch.tensor(order, device=minibatch.mask.device))
        runs = self.batching.runs(ordered.sequences, ordered.response_mask, self.tokens_per_pass)
        places = torch.arange(len(ordered), device=minibatch.mask.device)
        parts = [minibatch] if len(runs) == 1 else [ordered.select(places[run]) for run in runs]
        actions = max(1, int(minibatch.mask.sum()))
        return [(part, int(part.mask.sum()) / actions) for part in parts]

    def losses(self, minibatch: Rollout) -> Losses:
        """(policy's loss, critic's, what is to be watched) of N sequences, with M tokens of the policy in all."""
        packed = self.batching.packed(minibatch.sequences, minibatch.response_mask)
        response = Responding.of(packed)
        hidden = packed_hidden(self.policy, packed, at=response.before)  # (M, D)
        flat_logprobs, flat_kl = self._logprobs_and_kl(packed, response, hidden)  # (M,)
        logprobs = self._actions(flat_logprobs, response.mask)  # (N, A)
        actions, old = minibatch.mask, minibatch.old_logprobs
        surrogate = self.loss(logprobs, old, minibatch.advantages, actions)
        detached = logprobs.detach()
        watched = {
            "policy_loss": surrogate.detach(),
            "clip_fraction": clip_fraction(detached, old, actions, getattr(self.loss, "clip_range", 0.2)),
            "approx_kl": masked_mean(kl_estimate(old, detached, "k3"), actions),
            "ratio": torch.where(actions, (detached - old).exp() - 1, 0.0).abs().max() + 1,
        }
        policy_loss = surrogate
        if self.kl.in_loss:
            mean_kl = masked_mean(self._kl(logprobs, flat_kl, response, minibatch), actions)  # nats per action
            watched["kl_loss"] = mean_kl.detach()
            policy_loss = surrogate + self.kl_coef * mean_kl
        blame(policy_loss, "the log-probs of the policy", detached)
        if self.critic is None:
            return policy_loss, policy_loss.new_zeros(()), watched
        values = scatter(self.critic.values(packed, response.before, hidden), response.mask)[:, : actions.shape[1]]
        value_loss = clipped_value_loss(values, minibatch.values, minibatch.returns, actions, self.value_clip_range)
        blame(value_loss, "the values of the critic", values)
        watched["value_loss"] = value_loss.detach()
        return policy_loss, value_loss, watched

    def _kl(self, logprobs: Tensor, flat_kl: Tensor | None, response: Responding, minibatch: Rollout) -> Tensor:
        """Divergence (N, A) from the reference, whose gradient is the penalty: over all tokens where ``flat_kl`` is
        given, else estimated from what was drawn."""
        if flat_kl is None:
            return kl_estimate(logprobs, minibatch.ref_logprobs, self.kl.estimator)
        return self._actions(flat_kl, response.mask)

    def _actions(self, x: Tensor, mask: Tensor) -> Tensor:
        """Per action (N, A) from per token (M,), which stand where ``mask`` (N, T) is True."""
        tokens = scatter(x, mask)
        return whole_answer(tokens, mask) if self.action == "answer" else tokens

    def _logprobs_and_kl(self, packed: Packed, response: Responding, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-probs (M,) of the responses' tokens from the policy's hidden states (M, D) before them; and, where the
        loss has it, the divergence (M,) from the reference over all tokens."""
        if not (self.kl.in_loss and self.kl.estimator == "full"):
            return token_logprobs_of(self.policy, hidden, response.tokens, self.temperature), None
        with torch.no_grad(), self.reference.for_penalty(self.policy) as reference:
            ref_hidden = packed_hidden(reference, packed, at=response.before)
        measure = partial(logprob_and_kl, self.policy, self.reference, self.temperature)
        both = by_token(self.policy, measure, hidden, response.tokens, ref_hidden)
        return both[:, 0], both[:, 1]
