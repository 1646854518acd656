"""Noise of the policy's gradient, measured so that the rungs of the ladder can be told apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from lit_rlhf.functional import gradient_noise
from lit_rlhf.stages.ppo.objective import Objective
from lit_rlhf.stages.ppo.rollout import Rollout


def probe(
    objective: Objective,
    minibatches: Iterable[Rollout],
    own_part: Callable[[Rollout], tuple[Rollout, Tensor | float]],
    mean: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Noise of a minibatch's policy gradient, ``ppo/gradient_variance``, ``_signal`` and ``_noise``: see
    :class:`lit_rlhf.functional.GradientNoise`. ``own_part`` is what this process reads of a minibatch, and its share,
    ``mean`` one over the processes."""
    parameters = [p for p in objective.policy.parameters() if p.requires_grad]

    def gradients() -> Iterator[list[Tensor]]:
        for minibatch in minibatches:
            total = [torch.zeros_like(p) for p in parameters]
            own, share = own_part(minibatch)
            for part, weight in objective.micro_batches(own):
                loss, *_ = objective.losses(part)
                found = torch.autograd.grad(loss * weight * share, parameters, allow_unused=True)
                for known, new in zip(total, found):
                    if new is not None:
                        known += new
            yield [mean(gradient) for gradient in total]

    measured = gradient_noise(gradients())
    return {f"ppo/gradient_{name}": torch.tensor(value) for name, value in measured._asdict().items()}
