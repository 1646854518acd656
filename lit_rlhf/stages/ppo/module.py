"""Proximal policy optimization against a reward model, token by token (InstructGPT; arXiv:1707.06347)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any

import torch
from lightning import LightningModule
from pydantic import Field
from torch import Tensor
from torchmetrics.aggregation import CatMetric
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.functional import (
    clip_fraction,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    gae,
    masked_mean,
    sequence_kl,
    token_rewards,
    whiten,
    win_rate,
)
from lit_rlhf.models import Responses, Sampling, freeze, generate, packed_scores, save_model, score_shift, score_std
from lit_rlhf.stages.ppo.rollout import Rollout, pack_on, response_logprobs, response_values
from lit_rlhf.stages.prompts import PromptBatch, spread
from lit_rlhf.text.packing import Packed
from lit_rlhf.text.records import shown
from lit_rlhf.training import OptimizerFactory, Schedule, adamw, decay_groups, seeded, warmup_decay


class PPOModule(LightningModule):
    """Alternates rollouts and optimization epochs: one ``training_step`` is one PPO iteration.

    Args:
        policy: what is trained; starts as the SFT model.
        reward_model: a sequence classifier with one label, frozen; it must share the policy's vocabulary.
        tokenizer: of the policy.
        critic: a sequence classifier read at every token; None starts it as a copy of the reward model.
        optimizer: receives the parameter groups of policy and critic.
        schedule: receives the optimizer and the number of optimizer steps.
        critic_lr: learning rate of the critic; the policy's is the optimizer's own.
        kl_coef: reward units a nat; weight of the penalty ``log pi - log pi_ref`` on every token.
        clip_range: how far the probability ratio may move before its gradient stops.
        value_clip_range: how far a value may move in one rollout, in reward units; None: unlimited.
        value_coef: weight of the critic's loss.
        gamma: discount of a token.
        lam: GAE's lambda; 1 is Monte Carlo, 0 one-step TD.
        ppo_epochs: optimization epochs a rollout.
        minibatch_size: answers an optimizer step and process.
        max_grad_norm: the gradients of policy and critic are clipped to it, each for itself.
        missing_eos_penalty: taken from the score of an answer that was cut off at max_new_tokens.
        sampling: how answers are drawn in rollouts and in validation.
        val_samples: answers a held-out prompt in validation.
        seed: of sampling and of the order of minibatches.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        reward_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        critic: PreTrainedModel | None = None,
        optimizer: OptimizerFactory = adamw,
        schedule: Schedule = warmup_decay,
        critic_lr: Annotated[float, Field(gt=0)] = 1e-3,
        kl_coef: Annotated[float, Field(ge=0)] = 0.1,
        clip_range: Annotated[float, Field(gt=0)] = 0.2,
        value_clip_range: Annotated[float, Field(gt=0)] | None = 0.2,
        value_coef: Annotated[float, Field(ge=0)] = 0.5,
        gamma: Annotated[float, Field(ge=0, le=1)] = 1.0,
        lam: Annotated[float, Field(ge=0, le=1)] = 0.95,
        ppo_epochs: Annotated[int, Field(ge=1)] = 1,
        minibatch_size: Annotated[int, Field(ge=1)] = 32,
        max_grad_norm: Annotated[float, Field(gt=0)] = 1.0,
        missing_eos_penalty: Annotated[float, Field(ge=0)] = 1.0,
        sampling: Sampling | None = None,
        val_samples: Annotated[int, Field(ge=1)] = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # the frozen models are not in the checkpoint
        check_vocabulary(policy, reward_model)
        self.tokenizer = tokenizer
        self.policy = policy.requires_grad_(True)
        self.reference = freeze(copy.deepcopy(policy))
        self.critic = (critic or copy.deepcopy(reward_model)).requires_grad_(True)
        self.reward_model = freeze(reward_model)
        self.optimizer, self.schedule, self.critic_lr = optimizer, schedule, critic_lr
        self.kl_coef, self.clip_range, self.value_clip_range = kl_coef, clip_range, value_clip_range
        self.value_coef, self.gamma, self.lam = value_coef, gamma, lam
        self.ppo_epochs, self.minibatch_size, self.max_grad_norm = ppo_epochs, minibatch_size, max_grad_norm
        self.missing_eos_penalty = missing_eos_penalty
        self.sampling, self.val_samples, self.seed = sampling or Sampling(), val_samples, seed
        if self.sampling.temperature == 0:
            raise UserError("ppo.module.sampling.temperature is 0: PPO learns from samples; give it a value above 0")
        self.register_buffer("iteration", torch.zeros((), dtype=torch.int64))
        self.register_buffer("episodes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("score_first", torch.zeros(()))  # mean score of the first rollout and of the last
        self.register_buffer("score_last", torch.zeros(()))
        self.register_buffer("entropy_last", torch.zeros(()))  # nats a token, of the last rollout
        self._val: dict[str, CatMetric] = {}
        self.eval()  # see train(): models made from a config come in training mode

    # ---------------------------------------------------------------- rollout

    @torch.no_grad()
    def collect(self, prompts: PromptBatch) -> Rollout:
        """Sample answers, score them, and work out what each token was worth."""
        answers = self.sample(self.policy, prompts.tokens, int(self.iteration), shard=self._shard)
        sequences = [p + r for p, r in zip(prompts.tokens, answers.token_lists())]
        packed = pack_on(sequences, self.tokenizer.pad_token_id, self.device)
        scores = self.score(packed, answers.finished)
        ref_logprobs = response_logprobs(self.reference, packed, answers.lengths, self.sampling.temperature)
        values = response_values(self.critic, packed, answers.lengths)
        rewards = token_rewards(scores, answers.logprobs, ref_logprobs, answers.mask, self.kl_coef)
        advantages, returns = gae(rewards, values, answers.mask, self.gamma, self.lam)
        rollout = Rollout(
            sequences, answers.lengths, answers.mask, answers.logprobs, ref_logprobs, values, rewards,
            self.whiten(advantages, answers.mask), returns,
        )  # fmt: skip
        self._log_rollout(rollout, scores, answers)
        return rollout

    @property
    def _shard(self) -> tuple[int, int]:
        return self.trainer.global_rank, self.trainer.world_size

    def sample(
        self, policy: PreTrainedModel, prompts: list[list[int]], *place: int, shard: tuple[int, int] = (0, 1)
    ) -> Responses:
        """One answer to each prompt; the draw depends on the seed and ``place`` alone."""
        return generate(
            policy,
            prompts,
            self.sampling,
            eos_id=self.tokenizer.eos_token_id,
            pad_id=self.tokenizer.pad_token_id,
            generator=seeded(self.seed, *place, device=self.device),
            shard=shard,
        )

    def score(self, packed: Packed, finished: Tensor) -> Tensor:
        """Scores (N,) in standard deviations of the SFT model's answers, demonstrations at 0."""
        raw = packed_scores(self.reward_model, packed).float()
        scores = (raw + score_shift(self.reward_model)) / score_std(self.reward_model)
        return scores - self.missing_eos_penalty * (~finished).float()

    def whiten(self, advantages: Tensor, mask: Tensor) -> Tensor:
        """Centred and scaled over all valid tokens of the rollout, over all processes together."""
        if self.trainer.world_size == 1:
            return whiten(advantages, mask)
        x = advantages[mask].double()
        sums = torch.stack([x.sum(), (x**2).sum(), x.new_tensor(float(len(x)))])
        total, squares, count = self.trainer.strategy.reduce(sums, reduce_op="sum")
        mean = total / count
        scaled = (advantages - mean) * (squares / count - mean**2 + 1e-8).rsqrt()
        return torch.where(mask, scaled, 0.0).to(advantages.dtype)

    # ------------------------------------------------------------ optimization

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One iteration: a rollout, then ``ppo_epochs`` passes over it in minibatches."""
        rollout = self.collect(batch)
        order = seeded(self.seed, int(self.iteration), 1)
        updates = []
        for _ in self._bar(range(self.ppo_epochs), "optimization epochs"):
            for minibatch in rollout.shuffled(self.minibatch_size, order):
                updates.append(self.update(minibatch))
        self.iteration += 1
        self.episodes += len(rollout) * self.trainer.world_size
        # Logged once an iteration: a value logged in each inner step would keep only the last one.
        means = {f"ppo/{name}": torch.stack([u[name] for u in updates]).mean() for name in updates[0]}
        self.log_dict(means, sync_dist=True, batch_size=len(rollout))
        self.log("ppo/episodes", self.episodes.float())
        self.log("ppo/lr", self.trainer.optimizers[0].param_groups[0]["lr"])

    def update(self, minibatch: Rollout) -> dict[str, Tensor]:
        """One optimizer step on a minibatch; returns what is to be watched."""
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        packed = pack_on(minibatch.sequences, self.tokenizer.pad_token_id, self.device)
        logprobs = response_logprobs(self.policy, packed, minibatch.lengths, self.sampling.temperature)
        values = response_values(self.critic, packed, minibatch.lengths)
        mask, old = minibatch.mask, minibatch.old_logprobs
        policy_loss = clipped_policy_loss(logprobs, old, minibatch.advantages, mask, self.clip_range)
        value_loss = clipped_value_loss(values, minibatch.values, minibatch.returns, mask, self.value_clip_range)
        # Policy and critic share no weights, so one backward pass of the sum serves both (and DDP).
        loss = policy_loss + self.value_coef * value_loss
        optimizer.zero_grad()
        self.manual_backward(loss * self._token_share(mask))
        norms = [
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.max_grad_norm)
            for model in (self.policy, self.critic)
        ]
        optimizer.step()
        schedule.step()
        return {
            "loss": loss.detach(),
            "policy_loss": policy_loss.detach(),
            "value_loss": value_loss.detach(),
            "clip_fraction": clip_fraction(logprobs.detach(), old, mask, self.clip_range),
            "approx_kl": masked_mean(old - logprobs.detach(), mask),
            "grad_norm": norms[0],
            "critic_grad_norm": norms[1],
        }

    def _token_share(self, mask: Tensor) -> Tensor | float:
        """Tokens of this process over the average of all: DDP's mean of the gradients is then a mean over tokens."""
        if self.trainer.world_size == 1:
            return 1.0
        mine = mask.sum().float()
        return mine / self.trainer.strategy.reduce(mine.clone(), reduce_op="mean")

    def configure_optimizers(self) -> dict[str, Any]:
        groups = decay_groups(self.policy) + decay_groups(self.critic, lr=self.critic_lr)
        optimizer = self.optimizer(groups)
        loader = self.trainer.datamodule.train_dataloader()
        per_rollout = -(-loader.batch_size // self.minibatch_size) * self.ppo_epochs
        return {"optimizer": optimizer, "lr_scheduler": self.schedule(optimizer, len(loader) * per_rollout)}

    # ---------------------------------------------------------------- watching

    def _log_rollout(self, rollout: Rollout, scores: Tensor, answers: Responses) -> None:
        kl = sequence_kl(rollout.old_logprobs, rollout.ref_logprobs, rollout.mask)
        metrics = {
            "ppo/score": scores.mean(),
            "ppo/score_std": scores.std(unbiased=False),
            "ppo/reward": rollout.rewards.sum(-1).mean(),
            "ppo/kl": kl.mean(),
            "ppo/entropy": masked_mean(answers.entropy, rollout.mask),
            "ppo/response_length": answers.lengths.float().mean(),
            "ppo/finished": answers.finished.float().mean(),
            "ppo/value": masked_mean(rollout.values, rollout.mask),
            "ppo/explained_variance": explained_variance(rollout.values, rollout.returns, rollout.mask),
        }
        if self.iteration == 0:
            self.score_first.copy_(self._mean(metrics["ppo/score"]))
        self.score_last.copy_(self._mean(metrics["ppo/score"]))
        self.entropy_last.copy_(self._mean(metrics["ppo/entropy"]))
        self.log_dict(metrics, sync_dist=True, batch_size=len(rollout))
        self.log_dict({n: metrics[f"ppo/{n}"] for n in ("score", "kl")}, prog_bar=True, logger=False)

    def _mean(self, value: Tensor) -> Tensor:
        """Over all processes."""
        return self.trainer.strategy.reduce(value.clone(), reduce_op="mean")

    def _bar(self, steps: Any, name: str) -> Any:
        quiet = self.trainer.progress_bar_callback is None or not self.trainer.is_global_zero
        return tqdm(steps, desc=name, leave=False, disable=quiet or len(steps) < 2)

    def write_samples(self) -> list[tuple[str, str]]:
        """(prompt, answer) of some held-out prompts, by the policy as it is now."""
        prompts = spread(self.trainer.datamodule.held_out_prompts, 4)
        answers = self.sample(self.policy, [p.tokens for p in prompts], int(self.iteration), 2)
        texts = self.tokenizer.batch_decode(answers.token_lists(), skip_special_tokens=True)
        return [(shown(p.messages), text.strip()) for p, text in zip(prompts, texts)]

    # -------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        # Every process answers all held-out prompts with the same random numbers, so there is nothing to gather.
        names = ("policy", "reference", "kl", "score", "correct")
        self._val = {name: CatMetric(sync_on_compute=False).to(self.device) for name in names}

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Answers of policy and reference to held-out prompts, graded by gold or, without it, by the reward model."""
        tokens = [t for t in batch.tokens for _ in range(self.val_samples)]
        for name, model in (("policy", self.policy), ("reference", self.reference)):
            answers = self.sample(model, tokens, batch_idx, 3)
            packed = pack_on(
                [p + r for p, r in zip(tokens, answers.token_lists())], self.tokenizer.pad_token_id, self.device
            )
            scores = self.score(packed, answers.finished)
            grades = self._grades(batch, answers)
            gold = scores if grades is None else scores.new_tensor([g.gold for g in grades])
            self._val[name].update(gold.view(-1, self.val_samples))
            if name == "policy":
                ref = response_logprobs(self.reference, packed, answers.lengths, self.sampling.temperature)
                self._val["kl"].update(sequence_kl(answers.logprobs, ref, answers.mask))
                self._val["score"].update(scores)
                if grades is not None:
                    self._val["correct"].update(scores.new_tensor([g.correct for g in grades]))

    def _grades(self, batch: PromptBatch, answers: Responses) -> list[Any] | None:
        judge = getattr(self.trainer.datamodule, "judge", None)
        if judge is None:
            return None
        texts = self.tokenizer.batch_decode(answers.token_lists(), skip_special_tokens=True)
        prompts = [m for m in batch.messages for _ in range(self.val_samples)]
        return [judge.grade(p, t.strip(), not f) for p, t, f in zip(prompts, texts, answers.finished.tolist())]

    def on_validation_epoch_end(self) -> None:
        policy, reference = (self._val[name].compute().cpu() for name in ("policy", "reference"))
        self.wins = win_rate(policy, reference)
        metrics = {
            "val/ppo/win_rate": self.wins.mean,
            "val/ppo/kl": self._val["kl"].compute().mean(),
            "val/ppo/score": self._val["score"].compute().mean(),
        }
        if getattr(self.trainer.datamodule, "judge", None) is not None:
            metrics |= {"val/ppo/gold": policy.mean(), "val/ppo/correct": self._val["correct"].compute().mean()}
        self.log_dict(metrics, prog_bar=True)

    # ------------------------------------------------------------- after it all

    def figures(self) -> dict[str, Any]:
        """Headline figures; ``kl`` in nats an answer and the win rate against SFT, both on held-out prompts."""
        metrics = {name: value.item() for name, value in self.trainer.callback_metrics.items()}
        gold = getattr(self.trainer.datamodule, "judge", None) is not None
        return {
            "score_first": self.score_first.item(),
            "score_last": self.score_last.item(),
            "kl": metrics["val/ppo/kl"],
            "entropy": self.entropy_last.item(),
            "episodes": int(self.episodes),
            "val_score": metrics["val/ppo/score"],
            "gold": metrics.get("val/ppo/gold"),
            "correct": metrics.get("val/ppo/correct"),
            "win_rate": {**self.wins._asdict(), "judge": "gold" if gold else "reward model (proxy)"},
        }

    def export(self, folder: Path) -> None:
        """Write ``model/``: a causal language model, like the SFT model it began as."""
        save_model(self.policy, self.tokenizer, folder / "model")

    def train(self, mode: bool = True) -> PPOModule:
        """Dropout stays off in every model, or the ratio of a first update would not be 1."""
        return super().train(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Without the frozen models, which are on disk already."""
        frozen = ("reference.", "reward_model.")
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if not k.startswith(frozen)}


def check_vocabulary(policy: PreTrainedModel, reward_model: PreTrainedModel) -> None:
    """Raise ``UserError`` where the reward model would read other words than the policy wrote."""
    ours, theirs = (m.get_input_embeddings().num_embeddings for m in (policy, reward_model))
    if ours != theirs:
        raise UserError(
            f"the policy has a vocabulary of {ours} tokens and the reward model one of {theirs}, so it would read "
            "other words than were written; train the reward model from the same SFT model (stage=reward)"
        )
