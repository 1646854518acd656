"""Part 1: the same tensors through TRL's PPO and through ours.

TRL's equations stand in the middle of ``PPOTrainer.train``. They are not copied here: TRL's trainer runs, and each time
it calls ``accelerator.backward`` the local variables of ``train`` are looked at. Ours get what TRL's got."""

from __future__ import annotations

import copy
import math
import sys
import textwrap
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed
from trl.experimental.ppo.ppo_trainer import masked_mean as trl_masked_mean, masked_whiten as trl_masked_whiten
from trl.experimental.utils import first_true_indices

from lit_rlhf.functional import (
    clip_fraction,
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    kl_estimate,
    last_position,
    masked_mean,
    sequence_kl,
    token_entropy,
    token_rewards,
    whiten,
)
from lit_rlhf.models import critic_from_reward_model
from lit_rlhf.models.heads import packed_scores
from lit_rlhf.models.responses import Responding, response_logprobs, scatter
from lit_rlhf.text.packing import pack
from trl_comparison.ours import CLIP, GAMMA, KL_COEF, LAM, MISSING_EOS, VALUE_CLIP
from trl_comparison.task import EOS, PAD, Task, train_quietly, trl_trainer

TOLERANCE = 2e-5  # float32, and TRL adds 1e-7 to the temperature

PLACE = (
    "TRL gives the score to one place behind the last token, where there is no action, if the batch has a column left "
    "for it; to the last token if not. With lam = 1 and gamma = 1 that changes no advantage. With lam < 1 the last "
    "token's advantage is then partly what the critic guesses once the answer is complete, although its score is "
    "known; with gamma < 1 the score is discounted once more; and an answer's advantages depend on whether a longer "
    "one stands beside it. InstructGPT's eq. 2 and GAE, where a finished episode is worth 0, speak for ours. With "
    "gamma = 1 the difference is small where the critic guesses the score well, and 0 while it is a copy of the reward "
    "model."
)
BESSEL = (
    "TRL divides by the deviation with n - 1, ours by the one with n. Neither is wrong; the factor "
    "sqrt((n - 1) / n) is 0.9995 for a thousand tokens."
)
BOTH = "What notes 1 and 2 and the critic's extra target of note 4 add up to."
EXTRA = (
    "TRL's critic also learns the value of the place behind the answer, which is its score: one more target an answer "
    "in the mean. Right for TRL, which uses this value; ours never asks for it."
)
CLIPPED = (
    "TRL counts where the clipped term is the larger loss, ours where the ratio has left the range on either side. "
    "Both are in use; only a figure to watch."
)
APPROX = (
    "TRL: half the squared log-ratio (k2), a mean over padding too. Ours: k3, over the answers' tokens alone, so that "
    "it does not depend on how much was padded. Only a figure to watch."
)
PADDED = (
    "TRL's mean also runs over padding, where the entropy is what the model would say after the end of the text. Ours "
    "is right: nothing is sampled there. Only a figure to watch."
)
MICRO = (
    "With gradient accumulation TRL averages over the tokens of each micro-batch and then over micro-batches, so a "
    "token in a batch of short answers weighs more. The mean over all tokens of the minibatch does not depend on how "
    "it is dealt out; ours has no micro-batches."
)
STEPS = (
    "TRL's loop hands each minibatch to accelerator.accumulate once, so accumulation adds up minibatches instead of "
    "micro-batches: one step where two were asked for. PPO as published steps after each minibatch. With "
    "gradient_accumulation_steps=1 TRL does, too."
)
NORMS = (
    "TRL's PPOTrainer never clips gradients, whatever max_grad_norm says. Ours clips those of policy and critic, each "
    "for itself. Not a matter of the equations."
)
PADDING = (
    "TRL takes the first padding token for the end of the answer, also one that the policy itself has drawn; the rest "
    "of the answer is then neither scored nor learned from. Ours knows lengths from sampling. It matters where the "
    "policy has not unlearned the padding token."
)


class Row(NamedTuple):
    """A line of the table: ``why`` is for a difference that is known; without one there must be none."""

    quantity: str
    ours: Tensor
    theirs: Tensor
    why: str = ""

    @property
    def difference(self) -> float:
        return (self.ours.double() - self.theirs.double()).abs().max().item()

    @property
    def as_expected(self) -> bool:
        return math.isfinite(self.difference) and (self.difference > TOLERANCE) == bool(self.why)


def rows(task: Task) -> list[Row]:
    """All that is compared."""
    torch.manual_seed(1)
    start = noisy(task.policy), noisy(task.reward_model)
    _, run, after = observe(task, *start)  # from the second epoch on ratios and values are clipped
    return [
        *models_and_masks(task, *start, run),
        *rewards_and_advantages(task, *start, run),
        *losses(run),
        *watched(run, after),
        *accumulation(task, *start),
        Row("length of an answer in which the padding token was drawn", *padding_drawn(), PADDING),
    ]


def noisy(model: PreTrainedModel) -> PreTrainedModel:
    """A policy that differs from its reference, or a critic that differs from the reward model."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return model


def observe(task: Task, policy: PreTrainedModel, critic: PreTrainedModel, **settings: Any) -> list[SimpleNamespace]:
    """The variables of TRL's ``train`` at each backward pass over a first rollout of 16 answers."""
    settings = {
        "per_device_train_batch_size": 16, "num_ppo_epochs": 3, "learning_rate": 3e-3, "seed": 3, **settings,
    }  # fmt: skip
    size = settings["per_device_train_batch_size"] * settings.get("gradient_accumulation_steps", 1)
    reference, _ = task.models()
    models = copy.deepcopy(policy), reference, copy.deepcopy(critic)
    trainer = trl_trainer(task, *models, total_episodes=size, **settings)
    seen: list[SimpleNamespace] = []
    steps: list[None] = []
    norms: list[None] = []
    backward, clip = trainer.accelerator.backward, trainer.accelerator.clip_grad_norm_

    def spy(loss: Tensor) -> None:
        names = sys._getframe(1).f_locals
        seen.append(SimpleNamespace(**{name: kept(value) for name, value in names.items()}, steps=steps, norms=norms))
        backward(loss)

    trainer.accelerator.backward = spy
    trainer.accelerator.clip_grad_norm_ = lambda *a, **k: norms.append(None) or clip(*a, **k)
    set_seed(trainer.args.seed)
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(None))
    train_quietly(trainer)
    run = seen[0]
    assert (run.queries == PAD).any(), "no prompt was padded"
    assert len(run.sequence_lengths.unique()) > 2 and not run.contain_eos_token.all(), "the answers are too much alike"
    return seen


def kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


# ------------------------------------------------------------------------------------------------- the comparisons


def models_and_masks(
    task: Task, policy: PreTrainedModel, critic: PreTrainedModel, run: SimpleNamespace
) -> Iterable[Row]:
    """From the sampled tokens on: TRL pads on the left and finds the end by padding, ours packs and keeps lengths."""
    prompts = [[t for t in row if t != PAD] for row in run.queries.tolist()]
    answers = [row[: row.index(EOS) + 1] if EOS in row else row for row in run.responses.tolist()]
    assert not any(PAD in answer for answer in answers), "padding was drawn; take another seed"
    packed = pack([p + a for p, a in zip(prompts, answers)], PAD, [len(a) for a in answers])
    lengths = torch.tensor([len(a) for a in answers])
    mask = torch.arange(run.responses.shape[1]) < lengths[:, None]
    finished = torch.tensor([a[-1] == EOS for a in answers])
    with torch.no_grad():
        logprobs, ref_logprobs = (response_logprobs(m, packed) for m in (policy, task.policy))
        before = Responding.of(packed).before
        values = scatter(critic_from_reward_model(policy, critic)(packed, before, None), mask)
        scores = packed_scores(task.reward_model, packed) - MISSING_EOS * (~finished).float()
    yield Row("mask of the answers' tokens", mask, ~run.padding_mask)
    yield Row("place of the last token", last_position(mask), run.sequence_lengths)
    yield Row("log-probs of the answers, nats", logprobs[mask], run.logprobs[mask])
    yield Row("log-probs under the reference, nats", ref_logprobs[mask], run.ref_logprobs[mask])
    yield Row("values before each token", values[mask], run.values[mask])
    yield Row("scores, less 1 for the answers that were cut off", scores, run.scores)


def rewards_and_advantages(
    task: Task, policy: PreTrainedModel, critic: PreTrainedModel, run: SimpleNamespace
) -> Iterable[Row]:
    mask, extended = ~run.padding_mask, ~run.padding_mask_p1
    short = run.sequence_lengths_p1 < mask.shape[1]  # there is a place behind the answer
    d = kl_estimate(run.logprobs, run.ref_logprobs)
    rewards = token_rewards(run.scores, KL_COEF * d, mask)
    k3 = observe(task, policy, critic, kl_estimator="k3")[0]
    yield Row("KL of each token, k1, nats", d[mask], run.kl[mask])
    yield Row("KL of each token, k3, nats", kl_estimate(k3.logprobs, k3.ref_logprobs, "k3")[mask], k3.kl[mask])
    yield Row("KL of each answer, nats", sequence_kl(run.logprobs, run.ref_logprobs, mask), run.kl.sum(1))
    yield Row("rewards, summed over each answer", rewards.sum(1), run.rewards.sum(1))
    yield Row("rewards of answers as long as the longest", rewards[~short], run.rewards[~short])
    yield Row("rewards of short answers", rewards[short], run.rewards[short], PLACE)

    theirs = raw_advantages(run)
    ours, returns = gae(rewards, run.values, mask, GAMMA, LAM)
    same, _ = gae(run.rewards, run.values, extended, GAMMA, LAM)
    long, brief = mask & ~short[:, None], mask & short[:, None]
    yield Row("GAE, of TRL's rewards", same, theirs)
    yield Row("GAE, of answers as long as the longest", ours[long], theirs[long])
    yield Row("GAE, of short answers", ours[brief], theirs[brief], PLACE)
    yield Row("returns of answers as long as the longest", returns[long], run.returns[long])
    yield Row("returns of short answers", returns[brief], run.returns[brief], PLACE)
    mc = observe(task, policy, critic, lam=1.0)[0]
    ours, returns = gae(token_rewards(mc.scores, mc.kl * KL_COEF, mask), mc.values, mask, 1.0, 1.0)
    yield Row("GAE with lam 1", ours[mask], raw_advantages(mc)[mask])
    yield Row("returns with lam 1", returns[mask], mc.returns[mask])

    mc = observe(task, policy, critic, lam=1.0, gamma=0.9)[0]
    penalties = KL_COEF * mc.kl
    ours, _ = gae(token_rewards(mc.scores, penalties, mask), mc.values, mask, 0.9, 1.0)
    late, _ = gae(token_rewards(torch.where(short, 0.9, 1.0) * mc.scores, penalties, mask), mc.values, mask, 0.9, 1.0)
    yield Row("GAE with lam 1 and gamma 0.9, of short answers", ours[brief], raw_advantages(mc)[brief], PLACE)
    yield Row("the same, with these answers' scores times gamma", late[brief], raw_advantages(mc)[brief])

    n = mask.sum()
    whitened = whiten(theirs, mask)
    yield Row("masked mean", masked_mean(theirs, mask), trl_masked_mean(theirs, mask))
    yield Row("whitened advantages, of the same advantages", whitened, run.advantages, BESSEL)
    yield Row("the same, times sqrt((n - 1) / n)", whitened * ((n - 1) / n).sqrt(), run.advantages)
    white = observe(task, policy, critic, whiten_rewards=True)[0]
    plain = trl_masked_whiten(run.rewards, extended, shift_mean=False)
    m = extended.sum()
    ours = whiten(run.rewards, extended) * ((m - 1) / m).sqrt() + masked_mean(run.rewards, extended)
    yield Row("TRL's option whiten_rewards, from our whiten", ours[extended], white.rewards[extended])
    yield Row("the same, from TRL's function", plain[extended], white.rewards[extended])


def raw_advantages(run: SimpleNamespace) -> Tensor:
    """TRL's before they are whitened."""
    return torch.stack(run.advantages_reversed[::-1], dim=1)


def losses(run: SimpleNamespace) -> Iterable[Row]:
    """At the second epoch; the rollout's tensors are put in the order of the minibatch."""
    order = torch.as_tensor(run.micro_batch_inds)
    mask, extended = ~run.padding_mask[order], ~run.padding_mask_p1[order]
    new, old, advantages = run.new_logprobs, run.mb_logprobs, run.mb_advantage
    values = run.vpred, run.mb_values, run.mb_return
    assert ((new - old).exp() - 1).abs()[mask].max() > CLIP, "no ratio was clipped"
    assert (run.vpred - run.mb_values).abs()[extended].max() > VALUE_CLIP, "no value was clipped"
    rewards = token_rewards(run.scores, KL_COEF * run.kl, ~run.padding_mask)
    ours, returns = gae(rewards, run.values, ~run.padding_mask, GAMMA, LAM)
    white = whiten(ours, ~run.padding_mask)[order]
    yield Row("policy loss, of the same tensors", clipped_policy_loss(new, old, advantages, mask, CLIP), run.pg_loss)
    yield Row("policy loss, from log-probs and scores on", clipped_policy_loss(new, old, white, mask, CLIP),
              run.pg_loss, BOTH)  # fmt: skip
    yield Row("value loss, of the same tensors", clipped_value_loss(*values, extended, VALUE_CLIP), run.vf_loss)
    yield Row("value loss, of the answers' tokens alone", clipped_value_loss(*values, mask, VALUE_CLIP),
              run.vf_loss, EXTRA)  # fmt: skip
    yield Row("value loss, from log-probs and scores on",
              clipped_value_loss(*values[:2], returns[order], mask, VALUE_CLIP), run.vf_loss, BOTH)  # fmt: skip


def watched(run: SimpleNamespace, after: SimpleNamespace) -> Iterable[Row]:
    """What is only logged; TRL's figures of the second epoch are known at the third."""
    mask = ~run.padding_mask[torch.as_tensor(run.micro_batch_inds)]
    new, old = run.new_logprobs, run.mb_logprobs
    yield Row("clip fraction", clip_fraction(new, old, mask, CLIP), after.pg_clipfrac_stats[1, 0, 0], CLIPPED)
    approx = masked_mean(kl_estimate(old, new, "k3"), mask)
    k2 = kl_estimate(old, new, "k2").mean()
    yield Row("approximate KL from the policy that sampled, k2, padding as 0", k2, after.approxkl_stats[1, 0, 0])
    yield Row("the same, k3, over the answers' tokens", approx, after.approxkl_stats[1, 0, 0], APPROX)
    entropy = token_entropy(run.logits)
    yield Row("entropy, over padding too, nats", entropy.mean(), after.entropy_stats[1, 0, 0])
    yield Row("the same, over the answers' tokens", masked_mean(entropy, mask), after.entropy_stats[1, 0, 0], PADDED)


def accumulation(task: Task, policy: PreTrainedModel, critic: PreTrainedModel) -> Iterable[Row]:
    """A rollout of 16 answers that is worked through eight at a time; TRL's steps and norms are counted, ours known."""
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_ppo_epochs": 1}
    micro = observe(task, policy, critic, **settings)
    new, old, advantages = (torch.cat([getattr(m, x) for m in micro])
                            for x in ("new_logprobs", "mb_logprobs", "mb_advantage"))  # fmt: skip
    mask = ~torch.cat([m.padding_mask[torch.as_tensor(m.micro_batch_inds)] for m in micro])
    loss = torch.stack([m.pg_loss for m in micro]).mean()
    yield Row("policy loss of 2 micro-batches", clipped_policy_loss(new, old, advantages, mask, CLIP), loss, MICRO)
    halves = observe(task, policy, critic, **settings, num_mini_batches=2)
    yield Row("optimizer steps per epoch, of 2 asked for, gradient_accumulation_steps=2",
              torch.tensor(2), torch.tensor(len(halves[0].steps)), STEPS)  # fmt: skip
    both = observe(task, policy, critic, per_device_train_batch_size=16, num_mini_batches=2, num_ppo_epochs=1)
    yield Row("the same, gradient_accumulation_steps=1", torch.tensor(2), torch.tensor(len(both[0].steps)))
    yield Row("gradient norms clipped a step", torch.tensor(2), torch.tensor(len(both[0].norms) // 2), NORMS)


def padding_drawn() -> tuple[Tensor, Tensor]:
    """(ours, TRL's) of an answer of five tokens, the third of them the padding token."""
    answer = torch.tensor([[3, 4, PAD, 5, EOS, PAD]])
    return last_position(torch.tensor([[True] * 5 + [False]])) + 1, first_true_indices(answer == PAD)


# -------------------------------------------------------------------------------------------------------- the table


def table(rows: list[Row]) -> str:
    """Markdown: one line a quantity, each reason once below."""
    notes = list(dict.fromkeys(row.why for row in rows if row.why))
    lines = ["| quantity | largest difference | note |", "|---|---|---|"]
    for row in rows:
        note = str(notes.index(row.why) + 1) if row.why else ""
        difference = "0" if row.difference == 0 else f"{row.difference:.1e}" if row.difference < 1e-4 else (
            f"{row.difference:.3g}")  # fmt: skip
        lines.append(f"| {row.quantity} | {difference} | {note if row.as_expected else note + ' UNEXPECTED'} |")
    wrap = textwrap.TextWrapper(120, subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join([*lines, "", *(wrap.fill(f"{i}. {note}") for i, note in enumerate(notes, 1))])
