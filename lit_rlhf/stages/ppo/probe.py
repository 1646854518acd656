"""Noise of the policy's gradient, measured so that the rungs of the ladder can be told apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from lit_rlhf.functional import gradient_noise
from lit_rlhf.stages.ppo.rollout import Rollout


def probe(
    parameters: Sequence[nn.Parameter],
    minibatches: Iterable[Rollout],
    losses: Callable[[Rollout], Iterable[Tensor]],
    mean: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Noise of a minibatch's gradient, ``ppo/gradient_variance``, ``_signal`` and ``_noise``: see
    :class:`lit_rlhf.functional.GradientNoise`.

    ``losses`` (scalars) of a minibatch, whose sum is this process's; ``mean`` is one over the processes."""

    def gradients() -> Iterator[list[Tensor]]:
        for minibatch in minibatches:
            total = [torch.zeros_like(p) for p in parameters]
            for loss in losses(minibatch):
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
                for known, new in zip(total, found):
                    if new is not None:
                        known += new
            yield [mean(gradient) for gradient in total]

    measured = gradient_noise(gradients())
    return {f"ppo/gradient_{name}": torch.tensor(value) for name, value in measured._asdict().items()}
