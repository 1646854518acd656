"""How noisy is the policy's gradient? Measured, so that the rungs of the ladder can be told apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_rlhf.stages.ppo.rollout import PROBE
from lit_rlhf.stages.prompts import PromptBatch
from lit_rlhf.training import seeded

if TYPE_CHECKING:
    from lit_rlhf.stages.ppo.module import PPOModule


def gradient_noise(module: PPOModule, prompts: PromptBatch, rollouts: int) -> dict[str, Tensor]:
    """Noise of one minibatch's policy gradient, over ``rollouts`` fresh rollouts of the policy as it is.

    ``ppo/gradient_variance`` is the trace of the gradient's covariance between minibatches, ``ppo/gradient_signal`` the
    squared norm of its mean (the square of the mean's own error taken off, so it may come out below 0), and
    ``ppo/gradient_noise`` their ratio, which no scaling of advantages changes."""
    parameters = [p for p in module.policy.parameters() if p.requires_grad]
    total = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    squares, count = 0.0, 0
    for i in range(rollouts):
        rollout = module.collect(prompts, i, PROBE)
        for minibatch in rollout.shuffled(module.minibatch_size, seeded(module.seed, i, PROBE)):
            gradients = [torch.zeros_like(p) for p in parameters]
            for part, share in module.micro_batches(minibatch):
                found = torch.autograd.grad(module.losses(part)[0] * share, parameters, allow_unused=True)
                for known, new in zip(gradients, found):
                    if new is not None:
                        known += new
            for known, new in zip(total, gradients):
                known += new
                squares += new.double().square().sum().item()
            count += 1
    mean_square = sum(g.square().sum().item() for g in total) / count**2
    variance = (squares / count - mean_square) * count / max(count - 1, 1)
    signal = mean_square - variance / count
    named = {"variance": variance, "signal": signal, "noise": variance / max(signal, 1e-12)}
    return {f"ppo/gradient_{name}": torch.tensor(value) for name, value in named.items()}
