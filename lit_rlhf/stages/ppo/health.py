"""A watch on a PPO run: each check reads the metrics so far and says in one sentence what is wrong.

A check is a pure function ``(history, limits) -> sentence or None``. docs/reading_a_ppo_run.md defines the metrics and
shows healthy and sick ones side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from pydantic import Field

from lit_rlhf.arguments import checked
from lit_rlhf.errors import TrainingDiverged
from lit_rlhf.functional import window_error
from lit_rlhf.training.callbacks import say_above_bar
from lit_rlhf.training.metrics_file import append_rows
from lit_rlhf.training.trainer import computes_in_half

History = dict[str, list[float]]  # metric -> its value in each iteration; nan where there was none
HELD_OUT = "val/ppo/score"
WATCHED = (
    "ppo/first_ratio", "ppo/first_kl", "ppo/approx_kl", "ppo/kl", "ppo/episodes", "ppo/entropy", "ppo/response_length",
    "ppo/finished", "ppo/explained_variance", "ppo/score", "ppo/score_std", "ppo/advantage_std", "ppo/gold", HELD_OUT,
)  # fmt: skip
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]


class Unhealthy(TrainingDiverged):
    """A check that was asked to end the run has found something."""


@checked
@dataclass(frozen=True)
class Limits:
    """From where on a check speaks; "at first" is the mean over the first ``baseline`` iterations."""

    baseline: Annotated[int, Field(ge=1)] = 3  # iterations at the start that later ones are compared with
    window: Annotated[int, Field(ge=2)] = 5  # latest iterations that are averaged
    first_ratio: Positive = 1e-3  # |ratio - 1| before a rollout's first step
    first_ratio_half: Positive = 0.5  # the same in half precision
    first_kl: Positive = 1e-3  # nats per token, before a rollout's first step
    first_kl_half: Positive = 1e-2  # the same in half precision
    approx_kl: Positive = 0.05  # nats per token that a rollout's updates move the policy
    approx_kl_once: Positive = 0.5  # the same of one rollout alone
    chance: Share = 1e-6  # of a negative KL being mere chance
    entropy: Share = 0.25  # of what it was at first
    length: Annotated[float, Field(gt=1)] = 1.5  # times what it was at first
    finished: Share = 0.1  # share of answers that ended at first and do not any more
    critic_start: Annotated[int, Field(ge=0)] = 10  # iterations that the critic has to become better than the mean
    spread_low: Share = 0.1  # standard deviation of scores or advantages, of what it was at first
    spread_high: Annotated[float, Field(gt=1)] = 5.0  # times what it was at first
    spread_least: Positive = 0.2  # reward units; where it was less at first, this is taken: rewards may begin rare
    held_out: Positive = 0.2  # fall of the held-out score, in standard deviations of the first scores
    gold: Positive = 4.0  # fall of the gold grade and rise of the score, each in its standard errors


# ------------------------------------------------------------------- the checks


def first_step(history: History, limits: Limits) -> str | None:
    """Before the first step after a rollout, the policy is the one that sampled."""
    ratio, kl = abs(_last(history, "ppo/first_ratio") - 1), _last(history, "ppo/first_kl")
    if ratio > limits.first_ratio or kl > limits.first_kl:
        return (
            "before the first step on the rollout the policy already differed from the one that sampled (ratio off 1 "
            f"by up to {ratio:.2g}, KL {kl:.2g} nats per token; both should be 0): log-probs of sampling and training "
            "disagree, usually by dropout, another temperature, stale weights or rounding; try "
            "ppo.trainer.precision=32-true, and if that changes nothing look for the difference in the code"
        )
    return None


def large_steps(history: History, limits: Limits) -> str | None:
    """The updates of one rollout stay near the policy that sampled it."""
    moved, once = _recent(history, "ppo/approx_kl", limits), _last(history, "ppo/approx_kl")
    if moved > limits.approx_kl or once > limits.approx_kl_once:
        now = f"{moved:.2g} nats per token (mean of {limits.window} iterations; {limits.approx_kl:.2g} is much)"
        if once > limits.approx_kl_once:
            now = f"{once:.2g} nats per token ({limits.approx_kl_once:.2g} is far too much)"
        return (
            f"the updates on one rollout move the policy by {now}: the steps are too large or too many for what a "
            "rollout can tell; try a lower ppo.optimizer.lr or ppo.module.ppo_epochs, or set ppo.kl.stop"
        )
    return None


def negative_kl(history: History, limits: Limits) -> str | None:
    """The mean of n sampled log-ratios log pi - log pi_ref is below -t with a chance of exp(-n t) at most, whatever
    policy and reference are: the mean of pi_ref / pi over answers of the policy is 1 (and then Markov's inequality)."""
    episodes = [0.0, *history["ppo/episodes"]]
    answers = [after - before for before, after in pairwise(episodes)][-limits.window :]
    total = sum(n * kl for n, kl in zip(answers, history["ppo/kl"][-limits.window :]))
    if total < math.log(limits.chance):
        return (
            f"the KL to the reference is negative, {total / sum(answers):.3f} nats per answer over the last "
            f"{sum(answers):,.0f} answers, which for answers of this policy has a chance below {limits.chance:.0e}: "
            "they were drawn from something else than the policy whose log-probs are taken, usually from stale weights "
            "or with tokens cut off; compare the two, beginning with ppo.sampling.temperature"
        )
    return None


def entropy_collapse(history: History, limits: Limits) -> str | None:
    """The policy still has a choice of words."""
    first, now = _first(history, "ppo/entropy", limits), _recent(history, "ppo/entropy", limits)
    if now < limits.entropy * first:
        return (
            f"the entropy fell to {now:.2g} nats per token from {first:.2g} at first: the policy writes ever the same, "
            "usually because nothing holds it near the reference or its steps are too large; try a higher "
            "ppo.module.kl_coef or a lower ppo.optimizer.lr"
        )
    return None


def growing_answers(history: History, limits: Limits) -> str | None:
    """Answers are about as long as those of the SFT model."""
    first, now = _first(history, "ppo/response_length", limits), _recent(history, "ppo/response_length", limits)
    if now > limits.length * first:
        return (
            f"answers grew to {now:.1f} tokens from {first:.1f} at first: what scores them likes length, deserved or "
            "not; read some samples, and if it is padding try ppo.scoring.length_penalty or a higher ppo.module.kl_coef"
        )
    return None


def unfinished_answers(history: History, limits: Limits) -> str | None:
    """Answers end by themselves as often as those of the SFT model."""
    first, now = _first(history, "ppo/finished", limits), _recent(history, "ppo/finished", limits)
    if now < first - limits.finished:
        return (
            f"only {now:.0%} of the answers end by themselves, {first:.0%} did at first: the policy unlearns to stop, "
            "usually because a cut-off answer costs less than a long one earns; try a higher "
            "ppo.scoring.missing_eos_penalty, or a larger ppo.sampling.max_new_tokens if the answers need it"
        )
    return None


def poor_critic(history: History, limits: Limits) -> str | None:
    """The critic knows more than the mean, after its first iterations."""
    recent = history["ppo/explained_variance"][limits.critic_start :][-limits.window :]
    if len(recent) == limits.window and all(value < 0 for value in recent):
        return (
            f"the critic is worse than a constant, explained variance {_mean(recent):.2g} in the last {limits.window} "
            "iterations: its advantages are noise, usually because its learning rate does not fit or it had too "
            "little time; try another ppo.module.critic_lr, ppo.module.critic_warmup or ppo.module.value_clip_range"
        )
    return None


def score_spread(history: History, limits: Limits) -> str | None:
    """Scores tell answers apart, and none is absurd."""
    first, now = _first(history, "ppo/score_std", limits), _recent(history, "ppo/score_std", limits)
    if now <= limits.spread_low * first:
        return (
            f"scores hardly differ any more, their standard deviation is {now:.2g} ({first:.2g} at first): all answers "
            "earn the same, because the policy always writes the same or the task is solved, so there is nothing left "
            "to learn; end the run here, or try a higher ppo.module.kl_coef"
        )
    if now > limits.spread_high * max(first, limits.spread_least):
        return (
            f"the standard deviation of the scores grew to {now:.2g} from {first:.2g} at first: the answers have left "
            "what the reward model was trained on, or a function returns extremes; try ppo.scoring.clip or a higher "
            "ppo.module.kl_coef"
        )
    return None


def advantage_spread(history: History, limits: Limits) -> str | None:
    """Advantages, before they are whitened, neither vanish nor explode."""
    first, now = _first(history, "ppo/advantage_std", limits), _recent(history, "ppo/advantage_std", limits)
    if now <= limits.spread_low * first:
        return (
            f"advantages have all but vanished, their standard deviation is {now:.2g} ({first:.2g} at first): the "
            "rewards no longer tell answers apart, and whitening makes signal of noise; end the run here, or set "
            "ppo.module.whiten=false"
        )
    if now > limits.spread_high * max(first, limits.spread_least):
        return (
            f"the standard deviation of the advantages grew to {now:.2g} from {first:.2g} at first: rewards or the "
            "critic's values run away, or answers that hardly differ are divided by their standard deviation (GRPO); "
            "try a lower ppo.module.critic_lr, ppo.scoring.clip, ppo.module.whiten=true or ppo/advantage=rloo"
        )
    return None


def worse_held_out(history: History, limits: Limits) -> str | None:
    """What is learned on the training prompts holds on others; twice in a row, for one validation may be chance."""
    times = [i for i, score in enumerate(history[HELD_OUT]) if math.isfinite(score)]
    if len(times) < 3:
        return None
    held_out = [history[HELD_OUT][i] for i in times]
    best = max(range(len(times) - 2), key=lambda i: held_out[i])
    fall = held_out[best] - max(held_out[-2:])
    before, now = (_mean(history["ppo/score"][max(0, i + 1 - limits.window) : i + 1]) for i in (times[best], times[-1]))
    if fall > limits.held_out * _first(history, "ppo/score_std", limits) and now > before:
        return (
            f"the score on held-out prompts fell to {held_out[-1]:.2f} from {held_out[best]:.2f} (iteration "
            f"{times[best] + 1}) while that on training prompts rose to {now:.2f} from {before:.2f}: the policy learns "
            "its prompts by heart; use more prompts, or try a lower ppo.trainer.limit_train_batches or a "
            "higher ppo.module.kl_coef"
        )
    return None


def over_optimization(history: History, limits: Limits) -> str | None:
    """What the judge thinks rises with what the reward model thinks (arXiv:2210.10760), beyond the noise of both."""
    gold, score, window = history["ppo/gold"], history["ppo/score"], limits.window
    ends = range(window, len(gold) - window + 1)  # of the windows that do not overlap the last one
    if not ends:
        return None
    best = max(ends, key=lambda end: _mean(gold[end - window : end]))
    before, now = (_mean(gold[end - window : end]) for end in (best, len(gold)))
    score_before, score_now = (_mean(score[end - window : end]) for end in (best, len(gold)))
    fell = before - now > limits.gold * window_error(gold, window)
    if fell and score_now - score_before > limits.gold * window_error(score, window):
        return (
            f"the gold grade fell to {now:.2f} from {before:.2f} (iterations {best - window + 1} to {best}) while the "
            f"score rose to {score_now:.2f} from {score_before:.2f}: the policy exploits mistakes of what scores it; "
            "try a higher ppo.module.kl_coef, a lower ppo.trainer.limit_train_batches or a better reward model"
        )
    return None


CHECKS: dict[str, Callable[[History, Limits], str | None]] = {
    check.__name__: check
    for check in (
        first_step, large_steps, negative_kl, entropy_collapse, growing_answers, unfinished_answers, poor_critic,
        score_spread, advantage_spread, worse_held_out, over_optimization,
    )
}  # fmt: skip
CheckName = Literal[tuple(CHECKS)]  # type: ignore[valid-type]


def findings(history: History, limits: Limits) -> dict[str, str]:
    """check -> what it says of the last iteration, of those that say something."""
    said = {name: check(history, limits) for name, check in CHECKS.items()}
    return {name: sentence for name, sentence in said.items() if sentence is not None}


# A comparison with nan is False: a check is silent while there is too little to go by, and where a metric is missing.


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]  # of a rollout that nobody scored there is no score
    return sum(known) / len(known) if known else math.nan


def _last(history: History, name: str) -> float:
    return history[name][-1] if history[name] else math.nan


def _first(history: History, name: str, limits: Limits) -> float:
    return _mean(history[name][: limits.baseline])


def _recent(history: History, name: str, limits: Limits) -> float:
    """Mean over the window; nan while there are fewer iterations."""
    values = history[name][-limits.window :]
    return _mean(values) if len(values) == limits.window else math.nan


# ----------------------------------------------------------------- the callback


class HealthWatch(Callback):
    """Asks every check after every iteration, and says each finding once, when it begins.

    ``ppo/findings`` counts the checks that find something in an iteration. To be placed before the callback that saves
    checkpoints.

    Args:
        path: ``health.jsonl``, a line for each finding with its iteration; None: not written.
        stop: names of checks that end the run with :class:`Unhealthy`.
        limits: from where on a check speaks.
    """

    def __init__(
        self, path: str | Path | None = None, stop: Sequence[CheckName] = (), limits: Limits = Limits()
    ) -> None:
        self.path = None if path is None else Path(path)
        self.stop = tuple(stop)
        self.limits = limits
        self.history: History = {name: [] for name in WATCHED}
        self.found: dict[str, str] = {}  # check -> what it said, with the iteration in which it began

    @property
    def iterations(self) -> int:
        """Iterations seen."""
        return len(self.history["ppo/kl"])

    def state_dict(self) -> dict[str, Any]:
        return {"history": {name: list(values) for name, values in self.history.items()}, "found": dict(self.found)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self.found = state_dict["history"], state_dict["found"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.path is not None and trainer.is_global_zero:
            append_rows(self.path, self.iterations + 1, [])  # what comes after the checkpoint is done again

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # Not sooner: what the iteration logs, a checkpoint and a validation after it are written.
        reason = next((name for name in self.found if name in self.stop), None)
        if trainer.strategy.reduce_boolean_decision(reason is not None, all=False):
            found = self.found.get(reason or "", "another process")
            raise Unhealthy(
                f"ppo: stopped, as ppo.health.stop asks for, by {found}. To go on from the last checkpoint all the "
                "same, add ppo.health.stop=[] to the command."
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        known = trainer.callback_metrics
        for name, values in self.history.items():
            fresh = name in known and name != HELD_OUT  # of a validation, Lightning keeps the last value for ever
            values.append(known[name].item() if fresh else math.nan)
        now = findings(self.history, self._limits_in(str(trainer.precision)))
        pl_module.log("ppo/findings", float(len(now)))
        begun = {name: sentence for name, sentence in now.items() if name not in self.found}
        self.found |= {name: f"{name} (iteration {self.iterations}): {said}" for name, said in begun.items()}
        if begun and trainer.is_global_zero:
            self._say(trainer, begun)

    def _limits_in(self, precision: str) -> Limits:
        half, limits = computes_in_half(precision), self.limits
        return replace(limits, first_ratio=limits.first_ratio_half, first_kl=limits.first_kl_half) if half else limits

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self.iterations and HELD_OUT in trainer.callback_metrics:
            self.history[HELD_OUT][-1] = trainer.callback_metrics[HELD_OUT].item()

    def _say(self, trainer: Trainer, begun: dict[str, str]) -> None:
        for name in begun:
            say_above_bar(trainer, f"  ppo: {self.found[name]}")
        if self.path is not None:
            rows = [{"step": self.iterations, "check": name, "finding": said} for name, said in begun.items()]
            append_rows(self.path, self.iterations, rows)
