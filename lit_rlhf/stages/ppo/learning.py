"""How PPO learns from a rollout: optimization epochs over minibatches, and the gradients of a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.models.batching import Batching
from lit_rlhf.models.gathering import sharded_root
from lit_rlhf.models.heads import Critic
from lit_rlhf.models.micro_batches import tokens_at_once
from lit_rlhf.models.reference import Reference
from lit_rlhf.models.text_rows import TextRows
from lit_rlhf.rollouts import Sampling
from lit_rlhf.stages.ppo.kl import KLPenalty
from lit_rlhf.stages.ppo.loss import PolicyLoss
from lit_rlhf.stages.ppo.objective import Objective
from lit_rlhf.stages.ppo.ptx import PretrainingText, gradient_norm, text_gradients
from lit_rlhf.stages.ppo.rollout import TEXT, Rollout
from lit_rlhf.training.all_processes import mean_of_all
from lit_rlhf.training.batches import seeded
from lit_rlhf.training.callbacks import inner_bar
from lit_rlhf.training.diverging import clip_gradients
from lit_rlhf.training.parts import losses_of
from lit_rlhf.training.trained_state import TrainedState


class LearnsFromRollouts(TrainedState):
    """The part of :class:`PPOModule` that takes optimizer steps; its settings are explained there."""

    policy: PreTrainedModel
    reference: Reference
    critic: Critic | None
    tokenizer: PreTrainedTokenizerBase
    loss: PolicyLoss
    kl: KLPenalty
    kl_coef: Tensor  # () reward units per nat
    iteration: Tensor  # () int64
    value_clip_range: float | None  # reward units
    value_coef: float
    action: Literal["token", "answer"]
    sampling: Sampling
    ppo_epochs: int
    minibatch_size: int  # answers per optimizer step and process
    micro_batch_size: int | None  # answers per pass through a model
    max_grad_norm: float
    critic_warmup: int  # iterations in which the critic alone learns
    ptx: PretrainingText | None
    ptx_coef: float
    ptx_ratio: float  # rows of text per answer
    packing: bool
    share_prompts: bool
    seed: int

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.register_buffer("iteration", torch.zeros((), dtype=torch.int64))

    @property
    def _shared(self) -> dict[str, Any]:
        """What collecting and learning have in common."""
        return {
            "policy": self.policy,
            "reference": self.reference,
            "critic": self.critic,
            "kl": self.kl,
            "kl_coef": self.kl_coef,
            "action": self.action,
            "batching": self.batching,
        }

    @property
    def batching(self) -> Batching:
        """How sequences are laid out for a pass through a model."""
        pad_id, size = self.tokenizer.pad_token_id, self.micro_batch_size
        # Processes whose models are sharded compute together, pass by pass.
        passes = int if sharded_root(self.policy) is None else self._most
        return Batching(pad_id, self.device, self.packing, self.share_prompts, size, passes)

    @property
    def objective(self) -> Objective:
        """The objective of this module, with models and coefficients as they are now."""
        return Objective(
            **self._shared,
            loss=self.loss,
            value_clip_range=self.value_clip_range,
            value_coef=self.value_coef,
            temperature=self.sampling.temperature,
            tokens_per_pass=tokens_at_once(self, learning=True),
        )

    def _optimize(self, rollout: Rollout, order: torch.Generator) -> list[dict[str, Tensor]]:
        """The optimization epochs; they end early where the policy has moved further than ``kl.stop``.

        Rollout and minibatches are those of all processes. One without a scored answer takes no step."""
        updates: list[dict[str, Tensor]] = []
        for _ in inner_bar(self.trainer, range(self.ppo_epochs), "optimization epochs"):
            for minibatch in rollout.shuffled(self.minibatch_size * self.trainer.world_size, order):
                if not minibatch.mask.any():
                    continue
                updates.append(self.update(minibatch, len(updates)))
                if self.kl.stop is not None and updates[-1]["approx_kl"].item() > self.kl.stop:
                    return updates
        return updates

    def on_train_end(self) -> None:
        if self.iteration > 0 and self.lr_schedulers().last_epoch == 0:
            raise UserError(
                "no answer of any rollout has a score, so nothing was learned; see what <stage>.reward_model and "
                "<stage>.scoring.functions say of an answer"
            )

    def update(self, minibatch: Rollout, number: int = 0) -> dict[str, Tensor]:
        """Optimizer step ``number`` of a rollout, on a minibatch of all processes; returns what is to be watched."""
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()
        # The text comes first: the last backward pass is of all that is trained, as DDP wants the one that it averages.
        watched = {} if self.ptx is None else self._learn_text(minibatch, number)
        watched |= self._add_gradients_of(minibatch)
        if self.iteration < self.critic_warmup:
            for parameter in self.policy.parameters():
                parameter.grad = None  # the optimizer leaves it alone
        watched["grad_norm"] = clip_gradients(self, self.policy, self.max_grad_norm)
        if self.critic is not None:
            watched["critic_grad_norm"] = clip_gradients(self, self.critic, self.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()  # a rollout needs their memory
        return watched

    def _add_gradients_of(self, minibatch: Rollout, synced: bool = True) -> dict[str, Tensor]:
        """Returns what is to be watched. ``synced``: the last backward pass averages over all processes."""
        own, share = self.own_part(minibatch)
        watched = self.objective.gradients(
            own,
            share,
            read=partial(losses_of, self, [self.critic, self.policy]),
            backward=lambda loss, last: self._add_gradients(loss, synced and last),
        )
        ratio = self.trainer.strategy.reduce(watched.pop("ratio"), reduce_op="max")
        return {**mean_of_all(self.trainer, watched), "ratio": ratio}

    def policy_losses(self, minibatch: Rollout) -> Iterator[Tensor]:
        """This process's losses of the policy on a minibatch of all processes, which add up, by micro-batch."""
        own, share = self.own_part(minibatch)
        for part, weight in self.objective.micro_batches(own):
            yield self.objective.losses(part)[0] * weight * share

    def own_part(self, minibatch: Rollout) -> tuple[Rollout, Tensor | float]:
        """(what this process learns from a minibatch of all of them, its share of the actions over that of the average
        process: the mean of the gradients is then a mean over actions)."""
        rank, processes = self._shard
        if processes == 1:
            return minibatch, 1.0
        own = minibatch.select(torch.arange(rank, len(minibatch), processes, device=minibatch.mask.device))
        return own, own.mask.sum() * processes / minibatch.mask.sum()

    def _add_gradients(self, loss: Tensor, synced: bool) -> None:
        strategy = self.trainer.strategy
        with nullcontext() if synced or self.trainer.world_size == 1 else strategy.block_backward_sync():
            self.manual_backward(loss)

    def _learn_text(self, minibatch: Rollout, number: int) -> dict[str, Tensor]:
        """Adds the gradients of pretraining text; before the first step of a rollout, the norms of both parts too."""
        watched = {}
        if number == 0:
            self._add_gradients_of(minibatch, synced=False)
            watched["rl_grad_norm"] = gradient_norm(self.policy, self.mean)
            self.zero_grad()
        parts, share = self.text_parts(number)
        backward = partial(self._add_gradients, synced=False)
        own = text_gradients(self.policy, parts, self.ptx_coef * share, backward) * share
        watched |= mean_of_all(self.trainer, {"ptx_loss": own})
        return watched | ({"ptx_grad_norm": gradient_norm(self.policy, self.mean)} if number == 0 else {})

    def text_parts(self, number: int) -> tuple[list[TextRows], float]:
        """(pretraining text of this process for optimizer step ``number``, in micro-batches; its share of the rows over
        that of the average process). Which text all processes read depends on iteration and step alone."""
        rank, processes = self._shard
        count = max(1, round(self.ptx_ratio * self.minibatch_size * processes))
        rows = self.ptx.rows(count, seeded(self.seed, int(self.iteration), number, 0, 1, TEXT)).tokens
        own = rows[rank::processes] if rank < count else rows[:1]
        size = self.micro_batch_size or max(1, tokens_at_once(self, learning=True) // (rows.shape[1] - 1))
        return [TextRows(part) for part in own.to(self.device).split(size)], len(own) * (
            rank < count
        ) * processes / count

    @property
    def _shard(self) -> tuple[int, int]:
        return self.trainer.global_rank, self.trainer.world_size

    def _most(self, count: int) -> int:
        """The largest of all processes."""
        return int(self.trainer.strategy.reduce(torch.tensor(count, device=self.device), reduce_op="max"))

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a value over all processes."""
        return value if self.trainer.world_size == 1 else self.trainer.strategy.reduce(value.clone(), reduce_op="mean")
