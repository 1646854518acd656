"""How noisy is the policy's gradient? Measured, so that the rungs of the ladder can be told apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lit_rlhf.functional import gradient_noise
from lit_rlhf.stages.ppo.objective import Objective
from lit_rlhf.stages.ppo.rollout import Rollout


def probe(objective: Objective, minibatches: Iterable[Rollout]) -> dict[str, Tensor]:
    """Noise of a minibatch's policy gradient, ``ppo/gradient_variance``, ``_signal`` and ``_noise``: see
    :class:`lit_rlhf.functional.GradientNoise`."""
    parameters = [p for p in objective.policy.parameters() if p.requires_grad]

    def gradients() -> Iterator[list[Tensor]]:
        for minibatch in minibatches:
            total = [torch.zeros_like(p) for p in parameters]
            for part, share in objective.micro_batches(minibatch):
                loss, *_ = objective.losses(part)
                found = torch.autograd.grad(loss * share, parameters, allow_unused=True)
                for known, new in zip(total, found):
                    if new is not None:
                        known += new
            yield total

    measured = gradient_noise(gradients())
    return {f"ppo/gradient_{name}": torch.tensor(value) for name, value in measured._asdict().items()}
