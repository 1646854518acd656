"""How noisy is the policy's gradient? Measured, so that the rungs of the ladder can be told apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from lit_rlhf.functional import gradient_noise
from lit_rlhf.stages.ppo.rollout import Rollout

# minibatch -> (what a backward pass may take of it, its share of the actions)
Parts = Callable[[Rollout], list[tuple[Rollout, float]]]


def probe(
    policy: nn.Module, minibatches: Iterable[Rollout], parts: Parts, loss: Callable[[Rollout], Tensor]
) -> dict[str, Tensor]:
    """Noise of a minibatch's policy gradient, ``ppo/gradient_variance``, ``_signal`` and ``_noise``: see
    :class:`lit_rlhf.functional.GradientNoise`."""
    parameters = [p for p in policy.parameters() if p.requires_grad]

    def gradients() -> Iterator[list[Tensor]]:
        for minibatch in minibatches:
            total = [torch.zeros_like(p) for p in parameters]
            for part, share in parts(minibatch):
                found = torch.autograd.grad(loss(part) * share, parameters, allow_unused=True)
                for known, new in zip(total, found):
                    if new is not None:
                        known += new
            yield total

    measured = gradient_noise(gradients())
    return {f"ppo/gradient_{name}": torch.tensor(value) for name, value in measured._asdict().items()}
