"""Policy optimization against a reward model: PPO and the rungs of the ladder to it (InstructGPT; arXiv:1707.06347)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.functional import (
    adapted_kl_coef,
    clip_fraction,
    clipped_value_loss,
    explained_variance,
    full_kl,
    kl_estimate,
    masked_mean,
    masked_sum,
    population_std,
    sequence_kl,
    token_entropy,
    token_logprobs,
    token_rewards,
    whiten,
    whole_answer,
)
from lit_rlhf.models import (
    CriticFactory,
    Reference,
    ReferenceUpdate,
    Responding,
    TextRows,
    adds_to_gradients,
    by_token,
    check_rows,
    critic_from_reward_model,
    head_parameters,
    next_token_logits,
    packed_hidden,
    save_adapter,
    save_model,
    scatter,
    shares_prompts,
    stacked,
    text_loss,
    token_logprobs_of,
    tokens_at_once,
    train_adapters,
)
from lit_rlhf.rollouts import Engine, FastEngine, Responses, Sampling, draw_seeds, sample
from lit_rlhf.stages.ppo.advantage import GAE, AdvantageEstimator
from lit_rlhf.stages.ppo.checks import check_group, check_sampling, check_vocabulary
from lit_rlhf.stages.ppo.held_out import HeldOut
from lit_rlhf.stages.ppo.kl import KLPenalty
from lit_rlhf.stages.ppo.loss import ClippedLoss, KLPenaltyLoss, PolicyLoss
from lit_rlhf.stages.ppo.probe import gradient_noise
from lit_rlhf.stages.ppo.ptx import PretrainingText, gradient_norm, held_out_text_loss, pretraining_text
from lit_rlhf.stages.ppo.rollout import ORDER, ROLLOUT, SAMPLES, TEXT, Rollout, record_of
from lit_rlhf.stages.ppo.scoring import Scorer, Scoring
from lit_rlhf.stages.prompts import PromptBatch, repeated, spread
from lit_rlhf.stages.records import fit_context
from lit_rlhf.text.packing import Packed, pack, runs
from lit_rlhf.text.records import Messages, shown
from lit_rlhf.training import (
    OptimizerFactory,
    Schedule,
    TrainedState,
    adamw,
    decay_groups,
    inner_bar,
    seeded,
    warmup_decay,
)


class PPOModule(TrainedState):
    """Alternates rollouts and optimization epochs: one ``training_step`` is one iteration.

    Args:
        policy: what is trained; starts as the SFT model.
        reward_model: a sequence classifier with one label, frozen, of the policy's vocabulary; None: functions alone.
        tokenizer: of the policy.
        critic: makes the critic from policy and reward model; not asked where ``advantage`` needs none.
        advantage: ``(rewards, values, mask, answers_per_prompt) -> (advantages, returns)``.
        loss: ``(logprobs, old_logprobs, advantages, mask) -> loss`` of the policy, a mean over the actions.
        scoring: what an answer scores.
        kl: how the divergence from the reference is measured, held and paid for.
        kl_coef: reward units a nat; the price of that divergence, or the first one where it is adaptive.
        reference: whether the reference follows the policy.
        action: "token": every token is an action; "answer": the whole answer is one.
        answers_per_prompt: K; a rollout holds K answers to each prompt of a batch.
        optimizer: receives the parameter groups of policy and critic.
        schedule: receives the optimizer and the number of optimizer steps.
        critic_lr: learning rate of the critic; the policy's is the optimizer's own.
        critic_head_lr: learning rate of the critic's head, which may be fresh; None: ``critic_lr``.
        critic_warmup: iterations at the start in which only the critic learns.
        value_clip_range: how far a value may move in one rollout, in reward units; None: unlimited.
        value_coef: weight of the critic's loss.
        whiten: centre and scale the advantages over all actions of a rollout.
        ptx: makes the pretraining text, ``(tokenizer=...) -> PretrainingText``; not asked while ``ptx_coef`` is 0.
        ptx_coef: weight of the language-modelling loss on that text, per nat a token (InstructGPT, eq. 2).
        ptx_ratio: rows of that text an answer.
        ppo_epochs: optimization epochs a rollout.
        minibatch_size: answers an optimizer step and process.
        micro_batch_size: answers in a pass through a model, with gradients (which add up to the minibatch's) or
            without; None: by :func:`lit_rlhf.models.tokens_at_once`.
        max_grad_norm: the gradients of policy and critic are clipped to it, each for itself.
        probe_rollouts: rollouts on which the gradient's noise is measured, before the policy's first step; 0: not done.
        packing: lay sequences one after another (they do not see each other); False: pad a batch to its longest.
        share_prompts: read a prompt once for all its answers in a batch, where attention can be told so.
        sampling: how answers are drawn in rollouts and in validation.
        engine: what draws them; None: :class:`FastEngine`.
        val_samples: answers a held-out prompt in validation.
        seed: of sampling and of the order of minibatches.
    """

    frozen_models = ("reference.start.", "scorer.reward_model.")  # a reference that moves is kept

    def __init__(
        self,
        policy: PreTrainedModel,
        reward_model: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        critic: CriticFactory = critic_from_reward_model,
        advantage: AdvantageEstimator = GAE(),
        loss: PolicyLoss = ClippedLoss(),
        scoring: Scoring = Scoring(),
        kl: KLPenalty = KLPenalty(),
        kl_coef: Annotated[float, Field(ge=0)] = 0.05,
        reference: ReferenceUpdate = ReferenceUpdate(),
        action: Literal["token", "answer"] = "token",
        answers_per_prompt: Annotated[int, Field(ge=1)] = 1,
        optimizer: OptimizerFactory = partial(adamw, lr=3e-6),
        schedule: Schedule = partial(warmup_decay, shape="linear"),
        critic_lr: Annotated[float, Field(gt=0)] = 1e-5,
        critic_head_lr: Annotated[float, Field(gt=0)] | None = 1e-3,
        critic_warmup: Annotated[int, Field(ge=0)] = 0,
        value_clip_range: Annotated[float, Field(gt=0)] | None = 0.2,
        value_coef: Annotated[float, Field(ge=0)] = 0.5,
        whiten: bool = True,
        ptx: Callable[..., PretrainingText] | None = None,
        ptx_coef: Annotated[float, Field(ge=0)] = 0.0,
        ptx_ratio: Annotated[float, Field(gt=0)] = 0.25,
        ppo_epochs: Annotated[int, Field(ge=1)] = 1,
        minibatch_size: Annotated[int, Field(ge=1)] = 32,
        micro_batch_size: Annotated[int, Field(ge=1)] | None = None,
        max_grad_norm: Annotated[float, Field(gt=0)] = 1.0,
        probe_rollouts: Annotated[int, Field(ge=0)] = 0,
        packing: bool = True,
        share_prompts: bool = True,
        sampling: Sampling = Sampling(),
        engine: Engine | None = None,
        val_samples: Annotated[int, Field(ge=1)] = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        check_vocabulary(policy, reward_model)
        check_group(advantage, answers_per_prompt)
        self.tokenizer = tokenizer
        self.policy = policy
        if not any(p.requires_grad for p in policy.parameters()):  # it came frozen out of another module
            train_adapters(policy)
        self.reference = Reference(policy, reference)
        self.critic = critic(policy, reward_model) if getattr(advantage, "needs_critic", True) else None
        self.scorer = Scorer(reward_model, scoring)
        self.advantage, self.loss, self.kl = advantage, loss, kl
        self.action, self.answers_per_prompt = action, answers_per_prompt
        self.optimizer, self.schedule = optimizer, schedule
        self.critic_lr, self.critic_head_lr = critic_lr, critic_head_lr
        self.critic_warmup = critic_warmup if self.critic is not None else 0
        self.value_clip_range, self.value_coef, self.whiten_advantages = value_clip_range, value_coef, whiten
        self.ptx_coef, self.ptx_ratio = ptx_coef, ptx_ratio
        self.ptx = pretraining_text(ptx, tokenizer) if ptx_coef > 0 else None
        if self.ptx is not None:
            check_rows(policy, self.ptx.block_size, "ppo.ptx.block_size")
        self.ppo_epochs, self.minibatch_size, self.max_grad_norm = ppo_epochs, minibatch_size, max_grad_norm
        self.micro_batch_size = micro_batch_size
        self.probe_rollouts = probe_rollouts
        self.sampling, self.engine, self.seed = sampling, engine or FastEngine(), seed
        check_sampling(self.sampling)
        self.register_buffer("kl_coef", torch.tensor(float(kl_coef)))  # an int could not adapt
        self.register_buffer("iteration", torch.zeros((), dtype=torch.int64))
        self.register_buffer("episodes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("score_first", torch.zeros(()))  # mean score of the first rollout and of the last
        self.register_buffer("score_last", torch.zeros(()))
        self.register_buffer("entropy_last", torch.zeros(()))  # nats a token, of the last rollout
        self.register_buffer("unscored", torch.zeros((), dtype=torch.int64))  # answers that nobody has scored
        self.held_out = HeldOut(val_samples)
        self.packing = packing
        self.share_prompts = share_prompts and answers_per_prompt > 1 and shares_prompts(self)
        self.eval()  # see train(): models made from a config come in training mode

    def setup(self, stage: str) -> None:
        fit_context(self, self.sampling.max_new_tokens)

    # ---------------------------------------------------------------- rollout

    @torch.no_grad()
    def collect(self, prompts: PromptBatch, *place: int) -> Rollout:
        """Sample answers, score them, and work out what each action was worth; ``place`` sets off other draws."""
        prompts = repeated(prompts, self.answers_per_prompt)
        # A critic on the policy's trunk needs no other pass: it values the states that the answers were drawn from.
        states = self._critic_on_policy and not self._reads_policy and self.engine.gives_states
        place_of_draw = place or (int(self.iteration),)
        answers = self.sample(self.policy, prompts.tokens, *place_of_draw, shard=self._shard, states=states)
        sequences = [p + r for p, r in zip(prompts.tokens, answers.token_lists())]
        lengths, mask = answers.lengths, answers.mask
        packed = self.in_batches(sequences, lengths)
        texts = answers.texts(self.tokenizer)
        raw = self.scorer.raw(packed, prompts.messages, texts, record_of(prompts, answers))
        if not place:
            self.scorer.observe(raw, lambda x: self._reduce(x, "sum"))
        scores = self.scorer.shape(raw, lengths, answers.finished)
        said = self.said(packed)
        if answers.states is not None:
            said["values"] = torch.where(mask, self.critic.head(answers.states).squeeze(-1).float(), 0.0)
        values, ref_logprobs = said.get("values", torch.zeros_like(answers.logprobs)), said["ref_logprobs"]
        if not self._exact:  # then the figures are those of a training pass
            answers = answers._replace(logprobs=said["logprobs"], entropy=said["entropy"])
        kl = said["kl"] if "kl" in said else self._sampled_kl(answers.logprobs, ref_logprobs)
        penalties = torch.zeros_like(kl) if self.kl.in_loss else self.kl_coef * kl
        rewards = token_rewards(scores.nan_to_num(), penalties, mask)
        token_mask, ref_tokens, old_logprobs = mask, ref_logprobs, answers.logprobs
        mask = mask & self._learned(scores)[:, None]  # what nobody has scored is in no baseline, mean or loss
        if self.action == "answer":  # one action: what is taken in tokens is summed, and judged at its start
            rewards, old_logprobs, ref_logprobs = (
                whole_answer(x, token_mask) for x in (rewards, old_logprobs, ref_logprobs)
            )
            values, mask = values[:, :1], mask[:, :1]
        advantages, returns = self.advantage(rewards, values, mask, self.answers_per_prompt)
        spread = population_std(advantages[mask])
        if self.whiten_advantages:
            advantages = self.whiten(advantages, mask)
        returns = torch.zeros_like(values) if returns is None else returns
        rollout = Rollout(sequences, lengths, mask, old_logprobs, ref_logprobs, values, rewards, advantages, returns)
        if not place:
            self._log_rollout(rollout, scores, answers, sequence_kl(answers.logprobs, ref_tokens, token_mask))
            self.log("ppo/advantage_std", spread, sync_dist=True, batch_size=len(rollout))
            grades = self.grades(prompts.messages, texts, answers.finished)
            if grades is not None:  # nothing is learned from it
                self.log("ppo/gold", grades["gold"].mean(), sync_dist=True, batch_size=len(texts))
        return rollout

    def packed(self, sequences: list[list[int]], lengths: Tensor) -> Packed:
        """Without padding, on this module's device; responses of ``lengths`` (N,) tokens end the sequences."""
        pad_id, shared = self.tokenizer.pad_token_id, self.share_prompts
        packed = pack(sequences, pad_id, lengths.tolist(), shared, padded=not self.packing)
        return packed.to(self.device)

    def in_batches(self, sequences: list[list[int]], lengths: Tensor) -> list[Packed]:
        """The same, no more in one than a pass without gradients may take."""
        return [self.packed(sequences[run], lengths[run]) for run in self._runs(sequences, learning=False)]

    def micro_batches(self, minibatch: Rollout) -> list[tuple[Rollout, float]]:
        """(a part that a backward pass may take, its share of the actions): gradients of the parts, weighted so, add up
        to those of the whole."""
        actions = max(1, int(minibatch.mask.sum()))
        places = torch.arange(len(minibatch), device=minibatch.lengths.device)
        parts = [minibatch.select(places[run]) for run in self._runs(minibatch.sequences, learning=True)]
        return [(part, int(part.mask.sum()) / actions) for part in parts]

    def _runs(self, sequences: list[list[int]], learning: bool) -> list[slice]:
        if self.micro_batch_size is not None:
            return [slice(i, i + self.micro_batch_size) for i in range(0, len(sequences), self.micro_batch_size)]
        return runs([len(s) for s in sequences], tokens_at_once(self, learning))

    def _learned(self, scores: Tensor) -> Tensor:
        """Which answers (N,) are learned from: the scored ones, where they are compared with others two or more."""
        scored = ~scores.isnan()
        if not getattr(self.advantage, "compares_answers", False):
            return scored
        of_prompt = scored.view(-1, self.answers_per_prompt)
        return (of_prompt & (of_prompt.sum(1, keepdim=True) > 1)).view(-1)

    @property
    def _exact(self) -> bool:
        """Whether log-probs of the rollout engine are those of a training pass; in half precision they are not."""
        return self.engine.exact and str(self.trainer.precision).startswith(("32", "64"))

    @property
    def _reads_policy(self) -> bool:
        """Whether a rollout needs another pass of the policy over what it wrote."""
        return not self._exact or (self.kl.estimator == "full" and not self.kl.in_loss)

    @property
    def _critic_on_policy(self) -> bool:
        return self.critic is not None and self.critic.trunk is None

    @torch.no_grad()
    def said(self, batches: list[Packed]) -> dict[str, Tensor]:
        """What the models say of N answers of up to T tokens, which end the sequences of the batches, (N, T) each.

        ``ref_logprobs`` of the reference; ``values`` of a critic that must read the answers; ``logprobs`` and
        ``entropy`` of a training pass, where those of the engine are others; ``kl``, where it is over all tokens."""
        found = [self._said_of(packed, Responding.of(packed, packed.response_lengths)) for packed in batches]
        return {name: stacked([said[name] for said in found]) for name in found[0]}

    def _said_of(self, packed: Packed, response: Responding) -> dict[str, Tensor]:
        before, tokens = response.before, response.tokens
        said = {}
        hidden = packed_hidden(self.policy, packed, at=before) if self._reads_policy else None
        if self.critic is not None and (hidden is not None or not self._critic_on_policy):
            said["values"] = self.critic(packed, before, hidden)
        with self.reference.for_penalty(self.policy) as reference:
            ref_hidden = packed_hidden(reference, packed, at=before)
            said["ref_logprobs"] = token_logprobs_of(reference, ref_hidden, tokens, self.sampling.temperature)
        if hidden is not None and not self._exact:
            figures = by_token(self.policy, self._logprob_and_entropy, hidden, tokens)
            said["logprobs"], said["entropy"] = figures.unbind(-1)
        if hidden is not None and self.kl.estimator == "full" and not self.kl.in_loss:
            said["kl"] = by_token(self.policy, self._logprob_and_kl, hidden, tokens, ref_hidden)[:, 1]
        return {name: scatter(x, response.mask) for name, x in said.items()}

    def _logprob_and_entropy(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """(M, 2) from the policy's logits (M, V)."""
        logits = self._tempered(logits)
        return torch.stack([token_logprobs(logits, tokens), token_entropy(logits)], dim=-1)

    def _logprob_and_kl(self, logits: Tensor, tokens: Tensor, ref_hidden: Tensor) -> Tensor:
        """(M, 2) from the policy's logits (M, V) and the reference's hidden states (M, D); the divergence is over all
        tokens."""
        with torch.no_grad(), self.reference.for_penalty(self.policy) as reference:
            ref_logits = self._tempered(next_token_logits(reference, ref_hidden)).float()
        logits = self._tempered(logits)
        return torch.stack([token_logprobs(logits, tokens), full_kl(logits.float(), ref_logits)], dim=-1)

    def _tempered(self, logits: Tensor) -> Tensor:
        """Divided by the temperature that was sampled with, in the reference too: both are then distributions over what
        could have been drawn."""
        return logits if self.sampling.temperature == 1 else logits / self.sampling.temperature

    def _sampled_kl(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        # Full, in the loss: a rollout needs none.
        return kl_estimate(logprobs, ref_logprobs, "k1" if self.kl.estimator == "full" else self.kl.estimator)

    @property
    def _shard(self) -> tuple[int, int]:
        return self.trainer.global_rank, self.trainer.world_size

    def sample(
        self,
        policy: PreTrainedModel,
        prompts: list[list[int]],
        *place: int,
        purpose: int = ROLLOUT,
        shard: tuple[int, int] = (0, 1),
        states: bool = False,
    ) -> Responses:
        """One answer to each prompt; the draw depends on the seed, ``place`` and ``purpose`` alone."""
        seeds = draw_seeds(len(prompts), seeded(self.seed, *place, purpose), shard)
        return sample(self.engine, policy, self.tokenizer, prompts, self.sampling, seeds, states=states)

    def whiten(self, advantages: Tensor, mask: Tensor) -> Tensor:
        """Centred and scaled over all actions of the rollout, over all processes together."""
        if self.trainer.world_size == 1:
            return whiten(advantages, mask)
        x = advantages[mask].double()
        sums = torch.stack([x.sum(), (x**2).sum(), x.new_tensor(float(len(x)))])
        total, squares, count = self._reduce(sums, "sum")
        count = count.clamp(min=1)
        mean = total / count
        scaled = (advantages - mean) * (squares / count - mean**2 + 1e-8).rsqrt()
        return torch.where(mask, scaled, 0.0).to(advantages.dtype)

    # ------------------------------------------------------------ optimization

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One iteration: a rollout, then ``ppo_epochs`` passes over it in minibatches."""
        iteration = int(self.iteration)
        if self.probe_rollouts and iteration == self.critic_warmup:
            self.log_once(gradient_noise(self, batch, self.probe_rollouts))
        rollout = self.collect(batch)
        updates = self._optimize(rollout, seeded(self.seed, iteration, ORDER))
        self.iteration += 1
        self.episodes += len(rollout) * self.trainer.world_size
        self.log("ppo/episodes", self.episodes.float())
        self.log("ppo/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        self.log("ppo/kl_coef", self.kl_coef)
        if not updates:
            self.print(f"  ppo: iteration {iteration + 1} has no scored answer to learn from, so no step was taken")
            self.reference.follow(self.policy, int(self.iteration))
            return
        # Logged once an iteration: a value logged in each inner step would keep only the last one.
        means = {f"ppo/{n}": torch.stack([u[n] for u in updates if n in u]).mean() for n in updates[0]}
        means["ppo/first_ratio"], means["ppo/first_kl"] = updates[0]["ratio"], updates[0]["approx_kl"]
        del means["ppo/ratio"]
        self.log_dict(means, sync_dist=True, batch_size=len(rollout))
        self._adapt(rollout, self._mean(means["ppo/approx_kl"]).item())

    def _optimize(self, rollout: Rollout, order: torch.Generator) -> list[dict[str, Tensor]]:
        """The optimization epochs; they end early where the policy has moved further than ``kl.stop``.

        A minibatch in which no process has a scored answer takes no step."""
        updates: list[dict[str, Tensor]] = []
        for _ in inner_bar(self.trainer, range(self.ppo_epochs), "optimization epochs"):
            for minibatch in rollout.shuffled(self.minibatch_size, order):
                if not self.trainer.strategy.reduce_boolean_decision(bool(minibatch.mask.any()), all=False):
                    continue
                updates.append(self.update(minibatch, len(updates)))
                too_far = self.kl.stop is not None and updates[-1]["approx_kl"].item() > self.kl.stop
                # All processes stop together: one that went on alone would wait for the others forever.
                if self.trainer.strategy.reduce_boolean_decision(too_far, all=False):
                    return updates
        return updates

    def update(self, minibatch: Rollout, number: int = 0) -> dict[str, Tensor]:
        """Optimizer step ``number`` of a rollout, on a minibatch; returns what is to be watched."""
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()
        # The text comes first: the last backward pass is of all that is trained, as DDP wants the one that it averages.
        watched = {} if self.ptx is None else self._learn_text(minibatch, number)
        watched |= self._backward(minibatch)
        if self.iteration < self.critic_warmup:
            for parameter in self.policy.parameters():
                parameter.grad = None  # the optimizer leaves it alone
        watched["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        if self.critic is not None:
            watched["critic_grad_norm"] = torch.nn.utils.clip_grad_norm_(self.critic.parameters(), self.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()  # a rollout needs their memory
        return watched

    def _backward(self, minibatch: Rollout, synced: bool = True) -> dict[str, Tensor]:
        """Adds the gradients of a minibatch to those there are; returns what is to be watched.

        ``synced``: the last micro-batch averages them over all processes."""
        parts, share = self.micro_batches(minibatch), self._action_share(minibatch.mask)
        watched: dict[str, Tensor] = {}
        for i, (part, weight) in enumerate(parts):
            with adds_to_gradients(self) if self.trainer.world_size == 1 else nullcontext():
                policy_loss, value_loss, seen = self.losses(part)
            # One backward pass of the sum serves policy and critic, apart or on one trunk (and DDP).
            loss = (policy_loss + self.value_coef * value_loss) * share * weight
            ratio = torch.maximum(seen.pop("ratio"), watched.get("ratio", loss.detach().new_zeros(())))
            for name, value in seen.items():
                watched[name] = watched.get(name, 0.0) + value * weight
            watched |= {"loss": watched.get("loss", 0.0) + loss.detach(), "ratio": ratio}
            self._add_gradients(loss, synced and i == len(parts) - 1)
        return watched

    def _add_gradients(self, loss: Tensor, synced: bool) -> None:
        strategy = self.trainer.strategy
        with nullcontext() if synced or self.trainer.world_size == 1 else strategy.block_backward_sync():
            self.manual_backward(loss)

    def _learn_text(self, minibatch: Rollout, number: int) -> dict[str, Tensor]:
        """Adds the gradients of pretraining text; before the first step of a rollout, the norms of both parts too."""
        watched = {}
        if number == 0:
            self._backward(minibatch, synced=False)
            watched["rl_grad_norm"] = gradient_norm(self.policy)
            self.zero_grad()
        parts, losses = self.text_parts(number), []
        for part in parts:
            share = part.labels.numel() / sum(p.labels.numel() for p in parts)
            losses.append(text_loss(self.policy, part) * share)
            self._add_gradients(self.ptx_coef * losses[-1], synced=False)
        watched["ptx_loss"] = torch.stack(losses).detach().sum()
        return watched | ({"ptx_grad_norm": gradient_norm(self.policy)} if number == 0 else {})

    def losses(self, minibatch: Rollout) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """(policy's loss, critic's, what is to be watched) of a minibatch."""
        packed = self.packed(minibatch.sequences, minibatch.lengths)
        response = Responding.of(packed, minibatch.lengths)
        hidden = packed_hidden(self.policy, packed, at=response.before)
        logprobs, kl = self._logprobs_and_kl(packed, response, hidden)
        logprobs = self._actions(scatter(logprobs, response.mask), response.mask)
        actions, old = minibatch.mask, minibatch.old_logprobs
        policy_loss = self.loss(logprobs, old, minibatch.advantages, actions)
        detached = logprobs.detach()
        watched = {
            "policy_loss": policy_loss.detach(),
            "clip_fraction": clip_fraction(detached, old, actions, getattr(self.loss, "clip_range", 0.2)),
            "approx_kl": masked_mean(kl_estimate(old, detached, "k3"), actions),
            "ratio": torch.where(actions, (detached - old).exp() - 1, 0.0).abs().max() + 1,
        }
        if self.kl.in_loss:
            if kl is None:
                kl = kl_estimate(logprobs, minibatch.ref_logprobs, self.kl.estimator)
            else:
                kl = self._actions(scatter(kl, response.mask), response.mask)
            kl = masked_mean(kl, actions)  # from the reference, in nats an action; its gradient is the penalty
            watched["kl_loss"] = kl.detach()
            policy_loss = policy_loss + self.kl_coef * kl
        if self.critic is None:
            return policy_loss, policy_loss.new_zeros(()), watched
        values = scatter(self.critic(packed, response.before, hidden), response.mask)[:, : actions.shape[1]]
        value_loss = clipped_value_loss(values, minibatch.values, minibatch.returns, actions, self.value_clip_range)
        watched["value_loss"] = value_loss.detach()
        return policy_loss, value_loss, watched

    def _actions(self, x: Tensor, mask: Tensor) -> Tensor:
        """Per action from per token: (N, A) from (N, T)."""
        return whole_answer(x, mask) if self.action == "answer" else x

    def _logprobs_and_kl(self, packed: Packed, response: Responding, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-probs (M,) of the responses' tokens from the policy's hidden states (M, D) before them; and, where the
        loss has it, the divergence (M,) from the reference over all tokens."""
        if not (self.kl.in_loss and self.kl.estimator == "full"):
            return token_logprobs_of(self.policy, hidden, response.tokens, self.sampling.temperature), None
        with torch.no_grad(), self.reference.for_penalty(self.policy) as reference:
            ref_hidden = packed_hidden(reference, packed, at=response.before)
        both = by_token(self.policy, self._logprob_and_kl, hidden, response.tokens, ref_hidden)
        return both[:, 0], both[:, 1]

    def text_parts(self, number: int) -> list[TextRows]:
        """Pretraining text for optimizer step ``number``, in micro-batches; which text depends on iteration, step and
        process alone."""
        count = max(1, round(self.ptx_ratio * self.minibatch_size))
        generator = seeded(self.seed, int(self.iteration), number, *self._shard, TEXT)
        rows = self.ptx.rows(count, generator).to(self.device)
        size = self.micro_batch_size or max(1, tokens_at_once(self, learning=True) // rows.labels.shape[1])
        return [TextRows(part) for part in rows.tokens.split(size)]

    def _action_share(self, mask: Tensor) -> Tensor | float:
        """Actions of this process over the average of all: DDP's mean of the gradients is then a mean over actions."""
        if self.trainer.world_size == 1:
            return 1.0
        mine = mask.sum().float()
        return mine / self._reduce(mine.clone(), "mean")

    def _adapt(self, rollout: Rollout, moved: float) -> None:
        """What follows the policy from iteration to iteration: coefficients and reference."""
        if self.kl.adaptive and self.kl.target is not None:
            kl = self._mean(self.trainer.callback_metrics["ppo/kl"].to(self.device)).item()
            episodes = len(rollout) * self.trainer.world_size
            self.kl_coef.fill_(adapted_kl_coef(self.kl_coef.item(), kl, self.kl.target, episodes, self.kl.horizon))
        if isinstance(self.loss, KLPenaltyLoss):
            self.log("ppo/beta", self.loss.beta.clone())
            self.loss.adapt(moved)
        self.reference.follow(self.policy, int(self.iteration))

    def configure_optimizers(self) -> dict[str, Any]:
        groups = decay_groups(self.policy)
        if self.critic is not None:
            head = head_parameters(self.critic)
            groups += decay_groups(self.critic, head, self.critic_head_lr, lr=self.critic_lr)
        optimizer = self.optimizer(groups)
        loader = self.trainer.datamodule.train_dataloader()
        answers = loader.batch_size * self.answers_per_prompt
        per_rollout = -(-answers // self.minibatch_size) * self.ppo_epochs
        return {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer, len(loader) * per_rollout)}

    # ---------------------------------------------------------------- watching

    def _log_rollout(self, rollout: Rollout, scores: Tensor, answers: Responses, kl: Tensor) -> None:
        scored = ~scores.isnan()
        metrics = {
            "ppo/score": self._mean_of(scores, scored),
            "ppo/score_std": population_std(scores[scored]),
            "ppo/reward": self._mean_of(rollout.rewards.sum(-1), scored),
            "ppo/kl": kl.mean(),
            "ppo/entropy": masked_mean(answers.entropy, answers.mask),
            "ppo/response_length": answers.lengths.float().mean(),
            "ppo/finished": answers.finished.float().mean(),
        }
        if self.critic is not None:
            metrics["ppo/value"] = masked_mean(rollout.values, rollout.mask)
            metrics["ppo/explained_variance"] = explained_variance(rollout.values, rollout.returns, rollout.mask)
        if self.scorer.scoring.functions:  # which may say nothing
            metrics["ppo/unscored"] = 1 - scored.float().mean()
            self.unscored += self._reduce((~scored).sum(), "sum").long()
        if self.iteration == 0 or self.score_first.isnan():
            self.score_first.copy_(metrics["ppo/score"])
        if not metrics["ppo/score"].isnan():
            self.score_last.copy_(metrics["ppo/score"])
        self.entropy_last.copy_(self._mean(metrics["ppo/entropy"]))
        self.log_dict(metrics, sync_dist=True, batch_size=len(rollout))
        self.log_dict({n: metrics[f"ppo/{n}"] for n in ("score", "kl")}, prog_bar=True, logger=False)

    def log_once(self, metrics: dict[str, Tensor]) -> None:
        """Log in this iteration alone: what ``log`` gets, Lightning would repeat in every later one."""
        for logger in self.loggers:
            logger.log_metrics({name: value.item() for name, value in metrics.items()}, step=int(self.iteration))

    def _reduce(self, value: Tensor, how: str) -> Tensor:
        return self.trainer.strategy.reduce(value, reduce_op=how)

    def _mean(self, value: Tensor) -> Tensor:
        """Over all processes."""
        return self._reduce(value.clone(), "mean")

    def _mean_of(self, values: Tensor, counted: Tensor) -> Tensor:
        """Of the ``values`` (N,) that are ``counted`` (N,), over all processes; NaN without any."""
        total, count = self._reduce(torch.stack([masked_sum(values, counted), counted.sum().to(values)]), "sum")
        return total / count

    def grades(self, prompts: list[Messages], texts: list[str], finished: Tensor) -> dict[str, Tensor] | None:
        """``gold`` and ``correct`` (N,) by the gold judge; None where there is none."""
        judge = getattr(self.trainer.datamodule, "judge", None)
        if judge is None:
            return None
        grades = [judge.grade(m, t, not f) for m, t, f in zip(prompts, texts, finished.tolist())]
        return {
            name: torch.tensor([float(getattr(g, name)) for g in grades], device=self.device)
            for name in ("gold", "correct")
        }

    def write_samples(self) -> list[tuple[str, str]]:
        """(prompt, answer) of some held-out prompts, by the policy as it is now."""
        prompts = spread(self.trainer.datamodule.held_out_prompts, 4)
        answers = self.sample(self.policy, [p.tokens for p in prompts], int(self.iteration), purpose=SAMPLES)
        return [(shown(p.messages), text) for p, text in zip(prompts, answers.texts(self.tokenizer))]

    # -------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        self.held_out.begin()

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Answers of policy and SFT model to held-out prompts, graded by gold or, without it, by the score."""
        self.held_out.add(self, batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        metrics = self.held_out.metrics()
        if self.ptx is not None:
            metrics["ptx_loss"] = held_out_text_loss(self.policy, self.ptx, self.device)
        self.log_dict({f"val/ppo/{name}": value for name, value in metrics.items()}, prog_bar=True)

    # ------------------------------------------------------------- after it all

    def figures(self) -> dict[str, Any]:
        """Headline figures; ``kl`` in nats an answer and the win rate against SFT, both on held-out prompts."""
        metrics = {name: value.item() for name, value in self.trainer.callback_metrics.items()}
        gold, wins = getattr(self.trainer.datamodule, "judge", None) is not None, self.held_out.wins
        scorer = self.scorer.name
        figures: dict[str, Any] = {
            "score_first": self.score_first.item(),
            "score_last": self.score_last.item(),
            "kl": metrics["val/ppo/kl"],
            "entropy": self.entropy_last.item(),
            "episodes": int(self.episodes),
            "val_score": metrics["val/ppo/score"],
            "val_sft_score": metrics["val/ppo/sft_score"],
            "val_sft_score_std": metrics["val/ppo/sft_score_std"],
            "gold": metrics.get("val/ppo/gold"),
            "correct": metrics.get("val/ppo/correct"),
            "kl_coef": self.kl_coef.item(),
            "win_rate": {**wins._asdict(), "judge": "gold" if gold else f"{scorer} (proxy)"} if wins.n else None,
            "scored_by": scorer,
            "score_unit": self.scorer.unit,
        }
        if self.unscored:
            figures["unscored"] = int(self.unscored)
        if "val/ppo/ptx_loss" in metrics:
            figures["ptx_loss"] = metrics["val/ppo/ptx_loss"]
        return {name: None if figure != figure else figure for name, figure in figures.items()}  # NaN: nothing scored

    def export(self, folder: Path) -> None:
        """Write ``model/``, a causal language model like the SFT model it began as; with LoRA also ``adapter/``."""
        save_model(self.policy, self.tokenizer, folder / "model")
        save_adapter(self.policy, self.tokenizer, folder / "adapter")

    def train(self, mode: bool = True) -> PPOModule:
        """Dropout stays off in every model, or the ratio of a first update would not be 1."""
        return super().train(False)
