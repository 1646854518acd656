"""From prompts to a rollout: sample, score, divergence and values, rewards, actions, advantages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.functional import (
    explained_variance,
    kl_estimate,
    masked_mean,
    masked_sum,
    population_std,
    sequence_kl,
    token_rewards,
    whiten,
    whole_answer,
)
from lit_rlhf.models.batching import Batching
from lit_rlhf.models.chunked import by_token, token_logprobs_of
from lit_rlhf.models.finite import finite
from lit_rlhf.models.gathering import gathered
from lit_rlhf.models.heads import Critic
from lit_rlhf.models.policy import packed_hidden
from lit_rlhf.models.reference import Reference
from lit_rlhf.models.responses import Responding, scatter, stacked
from lit_rlhf.rollouts import Engine, Responses, Sampling, sample
from lit_rlhf.stages.answer_scores import record_of
from lit_rlhf.stages.ppo.advantage import AdvantageEstimator
from lit_rlhf.stages.ppo.kl import KLPenalty, logprob_and_entropy, logprob_and_kl
from lit_rlhf.stages.ppo.rollout import Rollout
from lit_rlhf.stages.ppo.scoring import Scorer
from lit_rlhf.stages.prompts import Judge, PromptBatch, grades_of, repeated
from lit_rlhf.text.packing import Packed

Statistics = dict[str, Tensor]  # name -> scalar


class Answered(NamedTuple):
    """N sampled responses to N prompts, before they are scored."""

    prompts: PromptBatch
    responses: Responses  # (N, T)
    sequences: list[list[int]]  # prompt and response
    response_mask: list[list[bool]]  # one per token of each sequence, True = written by the policy
    batches: list[Packed]  # the sequences, laid out for models that read them
    texts: list[str]
    raw_scores: Tensor  # (N,) of each response, before they are scaled; NaN: not scored


class ModelOutputs(NamedTuple):
    """Outputs of the models for N responses, token by token; 0 elsewhere."""

    logprobs: Tensor  # (N, T) nats, of the policy
    entropy: Tensor  # (N, T) nats, of the policy
    ref_logprobs: Tensor  # (N, T) nats, of the reference
    kl: Tensor  # (N, T) nats, an estimate of the policy's divergence from the reference
    values: Tensor  # (N, T) of the state before each token, in reward units; 0 without a critic


class Experience(NamedTuple):
    """N responses with scores and model outputs: those of this process, or of all processes."""

    sequences: list[list[int]]
    response_mask: list[list[bool]]
    mask: Tensor  # (N, T) bool, True = token of the response
    finished: Tensor  # (N,) bool
    raw_scores: Tensor  # (N,) as in :class:`Answered`
    gold: Tensor | None  # (N,) by the judge, where there is one
    outputs: ModelOutputs

    @classmethod
    def merged(cls, parts: Sequence[Experience], answers_per_prompt: int, device: torch.device) -> Experience:
        """Merge the experience of all processes, to which the prompts were dealt in turn, equally many to each."""
        if len(parts) == 1:
            return parts[0]
        count = len(parts) * len(parts[0].sequences)
        order = torch.arange(count).view(len(parts), -1, answers_per_prompt).transpose(0, 1).flatten()
        lists = [[row for part in parts for row in part[field]] for field in range(2)]
        masks, finished, raw_scores, gold = ([part[field] for part in parts] for field in range(2, 6))
        outputs = (stacked(tables)[order].to(device) for tables in zip(*(part.outputs for part in parts)))
        flat = (None if rows[0] is None else torch.cat(rows)[order].to(device) for rows in (finished, raw_scores, gold))
        sequences, response_mask = ([rows[i] for i in order.tolist()] for rows in lists)
        return cls(sequences, response_mask, stacked(masks)[order].to(device), *flat, ModelOutputs(*outputs))


@dataclass
class Collector:
    """Prompts in, a rollout and its statistics out. It changes no weights and logs nothing.

    It sees the models as they are. ``exact`` says whether the engine's log-probs are those of a training pass; else
    they are computed anew. ``gather`` gives what all processes have collected, from what this one has. With
    ``updates_scale`` scores enter the scorer's running scale; those of a rollout that is not learned from do not."""

    policy: PreTrainedModel
    reference: Reference
    critic: Critic | None
    scorer: Scorer
    judge: Judge | None  # grades that are watched and not learned from
    tokenizer: PreTrainedTokenizerBase
    engine: Engine
    sampling: Sampling
    exact: bool
    batching: Batching
    tokens_per_pass: int  # at most, without gradients
    kl: KLPenalty
    kl_coef: Tensor  # () reward units per nat
    advantage: AdvantageEstimator
    action: Literal["token", "answer"]
    answers_per_prompt: int
    whiten: bool
    gather: Callable[[Experience], list[Experience]]
    updates_scale: bool = True

    @torch.no_grad()
    def collect(self, prompts: PromptBatch, seeds: Sequence[int]) -> tuple[Rollout, Statistics]:
        """A rollout of K = ``answers_per_prompt`` responses to each prompt, of all processes together.

        N is the number of responses, T the length of the longest; A is T where every token is an action, 1 where a
        response is one. This process samples and reads those to ``prompts``, from a seed each, and works out the rest
        for all of them, as each process does."""
        # 1. Sample responses, and let the reward model, functions and judge read them.
        # A critic on the policy's backbone needs no other pass: it values the states that responses were drawn from.
        states = self._critic_on_policy and not self._reads_policy
        answered = self.answer(self.policy, repeated(prompts, self.answers_per_prompt), seeds, states=states)
        # 2. Log-probs, divergence from the reference, values: (N, T).
        experience = self._experience(answered, self.read(answered))
        token_mask, outputs = experience.mask, experience.outputs
        # 3. Scores (N,): scaled, clipped, less the penalties for length and for a missing end; NaN: nobody has scored.
        if self.updates_scale:
            self.scorer.observe(experience.raw_scores)
        scores = self.scorer.shape(experience.raw_scores, token_mask.sum(-1), experience.finished)
        # 4. Token rewards (N, T): the penalty on every token, the score on the last.
        penalties = torch.zeros_like(outputs.kl) if self.kl.in_loss else self.kl_coef * outputs.kl
        token_reward = token_rewards(scores.nan_to_num(), penalties, token_mask)
        # 5. From tokens to actions, (N, A). What nobody has scored is in no baseline, mean or loss.
        learned_mask = token_mask & self._learned(scores)[:, None]
        rewards, old_logprobs, ref_logprobs = (
            self._actions(x, token_mask) for x in (token_reward, outputs.logprobs, outputs.ref_logprobs)
        )
        values, mask = outputs.values[:, : rewards.shape[1]], learned_mask[:, : rewards.shape[1]]
        # 6. Advantages and the critic's targets, (N, A).
        raw_advantages, targets = self.advantage(rewards, values, mask, self.answers_per_prompt)
        advantages = whiten(raw_advantages, mask) if self.whiten else raw_advantages
        returns = torch.zeros_like(values) if targets is None else targets
        tensors = (mask, old_logprobs, ref_logprobs, values, rewards, advantages, returns)
        rollout = Rollout(experience.sequences, experience.response_mask, *tensors)
        return rollout, self._statistics(rollout, experience, scores, population_std(raw_advantages[mask]))

    def _experience(self, answered: Answered, outputs: ModelOutputs) -> Experience:
        """Of all processes, from what this one has sampled and read."""
        responses, grades = answered.responses, self.grades(answered)
        own = Experience(
            answered.sequences, answered.response_mask, responses.mask, responses.finished, answered.raw_scores,
            None if grades is None else grades["gold"], outputs,
        )  # fmt: skip
        return Experience.merged(self.gather(own), self.answers_per_prompt, responses.mask.device)

    @torch.no_grad()
    def answer(
        self, policy: PreTrainedModel, prompts: PromptBatch, seeds: Sequence[int], *, states: bool = False
    ) -> Answered:
        """One response of ``policy`` to each of N prompts, with its raw score; ``states`` as in ``Responses``."""
        responses = sample(self.engine, policy, self.tokenizer, prompts.tokens, self.sampling, seeds, states=states)
        written = responses.token_lists()
        sequences = [prompt + response for prompt, response in zip(prompts.tokens, written)]
        masks = [[False] * len(p) + [True] * len(r) for p, r in zip(prompts.tokens, written)]
        batches, texts = self.batching.batches(sequences, masks, self.tokens_per_pass), responses.texts(self.tokenizer)
        record = record_of(prompts, responses.finished.tolist())
        raw_scores = self.scorer.raw(batches, prompts.messages, texts, record)
        return Answered(prompts, responses, sequences, masks, batches, texts, raw_scores)

    def grades(self, answered: Answered) -> dict[str, Tensor] | None:
        """``gold`` and ``correct`` (N,) by the judge; None where there is none."""
        if self.judge is None:
            return None
        finished = answered.responses.finished.tolist()
        given = grades_of(self.judge, answered.prompts.messages, answered.texts, finished)
        names, like = ("gold", "correct"), answered.responses.logprobs
        return {name: like.new_tensor([float(getattr(grade, name)) for grade in given]) for name in names}

    @torch.no_grad()
    def read(self, answered: Answered) -> ModelOutputs:
        """Log-probs, divergence and values of all responses."""
        responses = answered.responses
        found = self.token_figures(answered.batches)
        if responses.states is not None:
            from_states = gathered(self.critic, lambda: self.critic.head(responses.states).squeeze(-1).float())
            found["values"] = torch.where(responses.mask, from_states, 0.0)
        logprobs, ref_logprobs = found.get("logprobs", responses.logprobs), found["ref_logprobs"]
        if "kl" not in found:  # of what was drawn; where the loss has the full one, a rollout needs none
            estimator = "k1" if self.kl.estimator == "full" else self.kl.estimator
            found["kl"] = kl_estimate(logprobs, ref_logprobs, estimator)
        values = found.get("values", torch.zeros_like(responses.logprobs))
        for tensor, name in ((logprobs, "log-probs of the policy"), (ref_logprobs, "log-probs of the reference"),
                             (values, "values of the critic")):  # fmt: skip
            finite(tensor, f"the {name}")
        return ModelOutputs(logprobs, found.get("entropy", responses.entropy), ref_logprobs, found["kl"], values)

    @torch.no_grad()
    def token_figures(self, batches: Sequence[Packed]) -> dict[str, Tensor]:
        """Figures (N, T) that need forward passes over the responses.

        ``ref_logprobs`` of the reference; ``values`` of a critic that must read the responses; ``logprobs`` and
        ``entropy`` of a training pass, where those of the engine are others; ``kl``, where it is over all tokens."""
        parts = [self._token_figures(packed, Responding.of(packed)) for packed in batches]
        return {name: stacked([part[name] for part in parts]) for name in parts[0]}

    def _token_figures(self, packed: Packed, response: Responding) -> dict[str, Tensor]:
        before, tokens, temperature = response.before, response.tokens, self.sampling.temperature
        found = {}
        hidden = packed_hidden(self.policy, packed, at=before) if self._reads_policy else None
        if self.critic is not None and (hidden is not None or not self._critic_on_policy):
            found["values"] = self.critic.values(packed, before, hidden)
        with self.reference.for_penalty(self.policy) as reference:
            ref_hidden = packed_hidden(reference, packed, at=before)
            found["ref_logprobs"] = token_logprobs_of(reference, ref_hidden, tokens, temperature)
        if hidden is not None and not self.exact:
            sampled = by_token(self.policy, partial(logprob_and_entropy, temperature), hidden, tokens)
            found["logprobs"], found["entropy"] = sampled.unbind(-1)
        if hidden is not None and self.kl.estimator == "full" and not self.kl.in_loss:
            measure = partial(logprob_and_kl, self.policy, self.reference, temperature)
            found["kl"] = by_token(self.policy, measure, hidden, tokens, ref_hidden)[:, 1]
        return {name: scatter(x, response.mask) for name, x in found.items()}

    @property
    def _critic_on_policy(self) -> bool:
        return self.critic is not None and self.critic.backbone is None

    @property
    def _reads_policy(self) -> bool:
        """Whether a rollout needs another pass of the policy over what it wrote."""
        stateless = self._critic_on_policy and not self.engine.gives_states
        return not self.exact or stateless or (self.kl.estimator == "full" and not self.kl.in_loss)

    def _learned(self, scores: Tensor) -> Tensor:
        """Which responses (N,) are learned from: the scored ones, where they are compared with others two or more."""
        scored = ~scores.isnan()
        if not getattr(self.advantage, "compares_answers", False):
            return scored
        of_prompt = scored.view(-1, self.answers_per_prompt)
        return (of_prompt & (of_prompt.sum(1, keepdim=True) > 1)).view(-1)

    def _actions(self, x: Tensor, mask: Tensor) -> Tensor:
        """Per action from per token: (N, A) from (N, T)."""
        return whole_answer(x, mask) if self.action == "answer" else x

    def _statistics(
        self, rollout: Rollout, experience: Experience, scores: Tensor, advantage_std: Tensor
    ) -> Statistics:
        """Of a rollout whose responses have ``scores`` (N,), NaN where nobody has scored."""
        outputs, token_mask, scored = experience.outputs, experience.mask, ~scores.isnan()
        found = {
            "score": _mean_of(scores, scored),
            "score_std": population_std(scores[scored]),
            "reward": _mean_of(rollout.rewards.sum(-1), scored),
            "kl": sequence_kl(outputs.logprobs, outputs.ref_logprobs, token_mask).mean(),
            "entropy": masked_mean(outputs.entropy, token_mask),
            "response_length": token_mask.sum(-1).float().mean(),
            "finished": experience.finished.float().mean(),
        }
        if self.critic is not None:
            found["value"] = masked_mean(rollout.values, rollout.mask)
            found["explained_variance"] = explained_variance(rollout.values, rollout.returns, rollout.mask)
        if self.scorer.may_say_nothing:
            found["unscored"] = 1 - scored.float().mean()
        found["advantage_std"] = advantage_std
        return found if experience.gold is None else {**found, "gold": experience.gold.mean()}


def _mean_of(values: Tensor, counted: Tensor) -> Tensor:
    """Of the ``values`` (N,) that are ``counted`` (N,); NaN without any."""
    return masked_sum(values, counted) / counted.sum().to(values)
