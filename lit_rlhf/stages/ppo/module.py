"""Policy optimization against a reward model: PPO and the rungs of the ladder to it (InstructGPT; arXiv:1707.06347)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from lightning import LightningDataModule
from lightning.pytorch.callbacks import Callback
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import UserError, say_once
from lit_rlhf.functional import adapted_kl_coef
from lit_rlhf.models.checkpoint import save_model
from lit_rlhf.models.heads import CriticFactory, critic_from_reward_model, head_parameters
from lit_rlhf.models.lora import learning, save_adapter
from lit_rlhf.models.micro_batches import tokens_at_once
from lit_rlhf.models.policy import shares_prompts
from lit_rlhf.models.reference import Reference, ReferenceUpdate
from lit_rlhf.models.text_rows import text_loss
from lit_rlhf.rollouts import Engine, FastEngine, Sampling, draw_seeds, sample
from lit_rlhf.stages.answer_scores import RewardModel
from lit_rlhf.stages.ppo.advantage import GAE, AdvantageEstimator
from lit_rlhf.stages.ppo.checks import check
from lit_rlhf.stages.ppo.collector import Collector, Statistics
from lit_rlhf.stages.ppo.held_out import HeldOut
from lit_rlhf.stages.ppo.kl import KLPenalty
from lit_rlhf.stages.ppo.learning import LearnsFromRollouts
from lit_rlhf.stages.ppo.loss import ClippedLoss, KLPenaltyLoss, PolicyLoss
from lit_rlhf.stages.ppo.probe import probe
from lit_rlhf.stages.ppo.progress import Progress, headline, means_over
from lit_rlhf.stages.ppo.ptx import PretrainingText, held_out_text_loss, pretraining_text
from lit_rlhf.stages.ppo.rollout import ORDER, PROBE, ROLLOUT, VALIDATION, Rollout
from lit_rlhf.stages.ppo.scoring import Scorer, Scoring, critic_in_units
from lit_rlhf.stages.prompts import Judge, PromptBatch, SamplePrompt, sample_texts
from lit_rlhf.stages.records import FitContext
from lit_rlhf.training.all_processes import gather_all, gather_step
from lit_rlhf.training.batches import largest, seeded
from lit_rlhf.training.dry_run import Meter
from lit_rlhf.training.fsdp import FSDP2
from lit_rlhf.training.optim import OptimizerFactory, Schedule, adamw, decay_groups, training_loader, warmup_decay
from lit_rlhf.training.trainer import computes_in_half


class PPOModule(LearnsFromRollouts):
    """Alternates rollouts and optimization epochs: one ``training_step`` is one iteration.

    Args:
        policy: what is trained; starts as the SFT model.
        reward_model: frozen; one that reads the policy's tokens, or what scores answers by their texts
            (:class:`lit_rlhf.models.answer_scorers.AnswerScorer`); None: functions alone.
        tokenizer: of the policy.
        gold_judge: grades rollouts and held-out answers, to be watched alone; None: there is none.
        critic: makes the critic from policy and reward model; not asked where ``advantage`` needs none.
        advantage: ``(rewards, values, mask, answers_per_prompt) -> (advantages, returns)``.
        loss: ``(logprobs, old_logprobs, advantages, mask) -> loss`` of the policy, a mean over the actions.
        scoring: what an answer scores.
        kl: how the divergence from the reference is measured, held and paid for.
        kl_coef: reward units per nat; the price of that divergence, or the first one where it is adaptive.
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
        ptx_coef: weight of the language-modelling loss on that text, per nat per token (InstructGPT, eq. 2).
        ptx_ratio: rows of that text per answer.
        ppo_epochs: optimization epochs per rollout.
        minibatch_size: answers per optimizer step and process.
        micro_batch_size: answers in a pass through a model, with gradients (which add up to the minibatch's) or
            without; None: by :func:`lit_rlhf.models.micro_batches.tokens_at_once`.
        max_grad_norm: the gradients of policy and critic are clipped to it, each for itself.
        probe_rollouts: rollouts on which the gradient's noise is measured, before the policy's first step; 0: not done.
        packing: lay sequences one after another (they do not see each other); False: pad a batch to its longest.
        share_prompts: read a prompt once for all its answers in a batch, where attention can be told so.
        sampling: how answers are drawn in rollouts and in validation.
        engine: what draws them; None: :class:`FastEngine`.
        val_samples: answers per held-out prompt in validation.
        sample_prompts: what the policy answers during training, for people to read.
        seed: of sampling and of the order of minibatches.
    """

    frozen_models = ("reference.start.", "scorer.reward_model.")  # a reference that moves is kept
    not_exported = ("reference", "scorer", "critic")

    def __init__(
        self,
        policy: PreTrainedModel,
        reward_model: RewardModel | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        gold_judge: Judge | None = None,
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
        critic_lr: Annotated[float, Field(ge=0)] = 1e-5,
        critic_head_lr: Annotated[float, Field(ge=0)] | None = 1e-3,
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
        sample_prompts: Sequence[SamplePrompt] = (),
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.sampling, self.engine, self.seed = sampling, engine or FastEngine(), seed
        check(policy, reward_model, advantage, answers_per_prompt, self.sampling)
        self.policy, self.reference, self.tokenizer = learning(policy), Reference(policy, reference), tokenizer
        needed = getattr(advantage, "needs_critic", True)
        self.critic = critic_in_units(critic, policy, reward_model, scoring) if needed else None
        self.scorer, self.gold_judge, self.sample_prompts = Scorer(reward_model, scoring), gold_judge, sample_prompts
        self.advantage, self.loss, self.kl, self.action = advantage, loss, kl, action
        self.optimizer, self.schedule, self.answers_per_prompt = optimizer, schedule, answers_per_prompt
        self.critic_lr, self.critic_head_lr, self.max_grad_norm = critic_lr, critic_head_lr, max_grad_norm
        self.critic_warmup = critic_warmup if self.critic is not None else 0
        self.value_clip_range, self.value_coef, self.whiten_advantages = value_clip_range, value_coef, whiten
        self.ptx = pretraining_text(ptx, policy, tokenizer) if ptx_coef > 0 else None
        self.ptx_coef, self.ptx_ratio, self.probe_rollouts, self.packing = ptx_coef, ptx_ratio, probe_rollouts, packing
        self.ppo_epochs, self.minibatch_size, self.micro_batch_size = ppo_epochs, minibatch_size, micro_batch_size
        self.register_buffer("kl_coef", torch.tensor(float(kl_coef)))  # an int could not adapt
        self.progress, self.held_out = Progress(), HeldOut(val_samples)
        readers = self.policy, self.reference, self.critic, self.scorer.token_reader
        self.share_prompts = share_prompts and answers_per_prompt > 1 and shares_prompts(*readers)
        self.eval()  # see train(): models made from a config come in training mode

    def configure_callbacks(self) -> list[Callback]:
        return [FitContext(self.sampling.max_new_tokens)]

    # ------------------------------------------------------------- collecting

    @property
    def collector(self) -> Collector:
        """The collector of this module, with models and coefficients as they are now."""
        precise = not computes_in_half(str(self.trainer.precision))  # else sampling and training round differently
        return Collector(
            **self._shared,
            scorer=self.scorer,
            judge=self.gold_judge,
            tokenizer=self.tokenizer,
            engine=self.engine,
            sampling=self.sampling,
            exact=self.engine.exact and precise,
            tokens_per_pass=tokens_at_once(self, learning=False),
            advantage=self.advantage,
            answers_per_prompt=self.answers_per_prompt,
            whiten=self.whiten_advantages,
            gather=partial(gather_all, self.trainer),
        )

    def collect(self, prompts: PromptBatch) -> tuple[Rollout, Statistics]:
        """This iteration's rollout, of all processes."""
        return self.collector.collect(prompts, self._seeds(prompts, seeded(self.seed, int(self.iteration), ROLLOUT)))

    def _seeds(self, prompts: PromptBatch, generator: torch.Generator) -> list[int]:
        """Seeds of this process's responses in a rollout, out of those of all processes that ``generator`` draws."""
        k = self.answers_per_prompt
        return draw_seeds(len(prompts.tokens) * k, generator, self._shard, together=k)

    def _probe(self, prompts: PromptBatch) -> dict[str, Tensor]:
        """Noise of the gradient, over ``probe_rollouts`` other rollouts of the policy as it is."""
        collector = replace(self.collector, updates_scale=False)
        seeds = (self._seeds(prompts, seeded(self.seed, i, PROBE, ROLLOUT)) for i in range(self.probe_rollouts))
        rollouts = (collector.collect(prompts, each)[0] for each in seeds)
        minibatches = (
            minibatch
            for i, rollout in enumerate(rollouts)
            for minibatch in rollout.shuffled(
                self.minibatch_size * self.trainer.world_size, seeded(self.seed, i, PROBE)
            )
        )
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        return probe(trained, minibatches, self.policy_losses, self.mean)

    # ------------------------------------------------------------ optimization

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One iteration: collect a rollout, log it, learn from it in ``ppo_epochs`` passes, adapt what follows."""
        if self.probe_rollouts and self.iteration == self.critic_warmup:
            self.log_once(self._probe(batch))
        rollout, statistics = self.collect(batch)
        self._log_rollout(rollout, statistics)
        updates = self._optimize(rollout, seeded(self.seed, int(self.iteration), ORDER))
        self.iteration += 1
        means, kl = self._log_updates(updates), statistics["kl"].item()
        self._adapt(rollout, means, kl)
        self._end_at_budget(kl)

    def dry_run(self, meter: Meter, data: LightningDataModule) -> None:
        """A rollout and a micro-batch of it, by models without values."""
        prompts = largest(data.train_dataloader())
        sample(self.engine, self.policy, self.tokenizer, prompts.tokens * self.answers_per_prompt, self.sampling)
        most = max(tokens_at_once(self, learning=True), tokens_at_once(self, learning=False))
        few = 1 + most // (data.longest() + self.sampling.max_new_tokens)  # prompts: passes over others are alike
        meter.times = max(1.0, len(prompts.tokens) / few)
        rollout, _ = self.collect(PromptBatch(*(column[:few] for column in prompts)))
        part = self.objective.micro_batches(rollout)[0][0]
        answers = len(prompts.tokens) * self.answers_per_prompt
        meter.steps = self.ppo_epochs * -(-answers // self.minibatch_size)
        passes = meter.steps * -(-min(answers, self.minibatch_size) // len(part))
        meter.learn(self, lambda: sum(self.objective.losses(part)[:2]), passes > meter.steps, passes)
        if self.ptx is not None:
            texts, _ = self.text_parts(0)
            meter.learn(self, lambda: text_loss(self.policy, texts[0]), True, meter.steps * len(texts))

    def _adapt(self, rollout: Rollout, means: dict[str, Tensor], kl: float) -> None:
        """What follows the policy from iteration to iteration: coefficients, where a step was taken, and reference."""
        if means and self.kl.adaptive and self.kl.target is not None:
            coef = adapted_kl_coef(self.kl_coef.item(), kl, self.kl.target, len(rollout), self.kl.horizon)
            self.kl_coef.fill_(coef)
        if means and isinstance(self.loss, KLPenaltyLoss):
            self.log("ppo/beta", self.loss.beta.clone())
            self.loss.adapt(means["ppo/approx_kl"].item())
        self.reference.follow(self.policy, int(self.iteration))

    def _end_at_budget(self, kl: float) -> None:
        """Training ends, as if this had been the last iteration, where answers have moved as far as they may."""
        if self.kl.budget is not None and kl >= self.kl.budget:
            self.print(
                f"  ppo: the answers of iteration {int(self.iteration)} are {kl:.1f} nats from the reference and "
                f"ppo.kl.budget is {self.kl.budget:g}: training ends here"
            )
            self.trainer.should_stop = True

    def configure_model(self) -> None:
        if self.probe_rollouts and isinstance(self.trainer.strategy, FSDP2):
            raise UserError(
                "probe_rollouts (ppo.module): the gradients of sharded models (strategy fsdp2) are not measured; set "
                "it to 0, or take trainer=ddp"
            )
        super().configure_model()

    def configure_optimizers(self) -> dict[str, Any]:
        groups = decay_groups(self.policy)
        if self.critic is not None:
            head = head_parameters(self.critic)
            groups += decay_groups(self.critic, head, self.critic_head_lr, lr=self.critic_lr)
        optimizer = self.optimizer(groups)
        loader = training_loader(self.trainer)
        rollout = loader.batch_size * self.answers_per_prompt
        if self.minibatch_size > rollout:
            self.print(
                f"ppo: ppo.module.minibatch_size is {self.minibatch_size} and a rollout has {rollout} answers "
                "(ppo.data.batch_size times ppo.module.answers_per_prompt): each optimizer step takes them all"
            )
        per_rollout = -(-rollout // self.minibatch_size) * self.ppo_epochs
        return {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer, len(loader) * per_rollout)}

    # ---------------------------------------------------------------- watching

    def _log_rollout(self, rollout: Rollout, statistics: Statistics) -> None:
        self.progress.add(statistics, len(rollout))
        metrics = {f"ppo/{name}": value for name, value in statistics.items()}
        self.log_dict(metrics)
        self.log_dict({n: metrics[f"ppo/{n}"] for n in ("score", "kl")}, prog_bar=True, logger=False)

    def _log_updates(self, updates: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Log the means over the optimizer steps of an iteration; returns them, {} where there was no step."""
        self.log("ppo/episodes", self.progress.episodes.float())
        self.log("ppo/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        self.log("ppo/kl_coef", self.kl_coef)
        if not updates:
            iteration = int(self.iteration)
            self.print(f"  ppo: iteration {iteration} has no scored answer to learn from, so no step was taken")
            return {}
        means = {f"ppo/{name}": value for name, value in means_over(updates).items()}
        self.log_dict(means)
        return means

    def log_once(self, metrics: dict[str, Tensor]) -> None:
        """Log in this iteration alone: what ``log`` gets, Lightning would repeat in every later one."""
        for logger in self.loggers:
            logger.log_metrics({name: value.item() for name, value in metrics.items()}, step=int(self.iteration))

    def write_samples(self) -> list[tuple[str, str]]:
        """(prompt, response) of ``sample_prompts``, by the policy as it is now."""
        return sample_texts(self, self.sampling, self.sample_prompts, say_once)

    # -------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        self.held_out.begin()

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Answers of policy and SFT model to held-out prompts, graded by gold or, without it, by the score."""
        k = self.held_out.samples
        seeds = draw_seeds(len(batch.tokens) * k, seeded(self.seed, batch_idx, VALIDATION), self._shard, together=k)
        found = self.held_out.answered(self.collector, batch, batch_idx, seeds)
        self.held_out.add(gather_step(self.trainer, found, batch_idx))

    def on_validation_epoch_end(self) -> None:
        metrics = self.held_out.metrics()
        if self.ptx is not None:
            metrics["ptx_loss"] = held_out_text_loss(self.policy, self.ptx, self.device, self.trainer)
        self.log_dict({f"val/ppo/{name}": value for name, value in metrics.items()}, prog_bar=True)

    # ------------------------------------------------------------- after it all

    def figures(self) -> dict[str, Any]:
        """Headline figures; ``kl`` in nats per answer and the win rate against SFT, both on held-out prompts."""
        metrics = {name: value.item() for name, value in self.trainer.callback_metrics.items()}
        judge = "gold" if self.gold_judge is not None else f"{self.scorer.name} (proxy)"
        return headline(metrics, self.progress, self.held_out.wins, self.scorer, judge, self.kl_coef.item())

    def export(self, folder: Path) -> None:
        """Write ``model/``, a causal language model like the SFT model it began as; with LoRA also ``adapter/``."""
        save_model(self.policy, self.tokenizer, folder / "model")
        save_adapter(self.policy, self.tokenizer, folder / "adapter")

    def train(self, mode: bool = True) -> PPOModule:
        """Dropout stays off in every model, or the ratio of a first update would not be 1."""
        return super().train(False)
