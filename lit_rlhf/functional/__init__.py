"""Pure tensor math: every equation of the method, each with its source. Imports torch only.

Shapes: B sequences (or N answers), T tokens, V vocabulary. Log-probs are in nats. Masks are True where a
position counts."""

from lit_rlhf.functional.advantage import (
    Baseline,
    baseline,
    gae,
    group_std,
    reward_to_go,
    token_rewards,
    whole_answer,
)
from lit_rlhf.functional.classify import added, classification_loss, side_by_side
from lit_rlhf.functional.kl import Estimator, adapted_kl_coef, full_kl, kl_estimate, sequence_kl
from lit_rlhf.functional.lm import lm_loss, token_entropy, token_logprobs
from lit_rlhf.functional.masking import last_position, masked_mean, masked_sum, position_ids, whiten
from lit_rlhf.functional.overoptimization import (
    GainFit,
    best_of_n_gain,
    expected_best_of_n,
    fit_best_of_n_gain,
    fit_rl_gain,
    rl_gain,
)
from lit_rlhf.functional.ppo import (
    adapted_beta,
    clip_fraction,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    importance_weighted_loss,
    kl_penalty_loss,
    policy_gradient_loss,
)
from lit_rlhf.functional.preference import (
    Pairs,
    dpo_loss,
    implicit_rewards,
    pair_accuracy,
    ranking_loss,
    ranking_pairs,
)
from lit_rlhf.functional.rating import WinRate, best_of_n, best_of_n_kl, pairwise_wins, wilson_interval, win_rate
from lit_rlhf.functional.sampling import filter_logits, sample_token

__all__ = [
    "Baseline",
    "Estimator",
    "GainFit",
    "Pairs",
    "WinRate",
    "adapted_beta",
    "adapted_kl_coef",
    "added",
    "baseline",
    "best_of_n",
    "best_of_n_gain",
    "best_of_n_kl",
    "classification_loss",
    "clip_fraction",
    "clipped_policy_loss",
    "clipped_value_loss",
    "dpo_loss",
    "expected_best_of_n",
    "explained_variance",
    "filter_logits",
    "fit_best_of_n_gain",
    "fit_rl_gain",
    "full_kl",
    "gae",
    "group_std",
    "implicit_rewards",
    "importance_weighted_loss",
    "kl_estimate",
    "kl_penalty_loss",
    "last_position",
    "lm_loss",
    "masked_mean",
    "masked_sum",
    "pair_accuracy",
    "pairwise_wins",
    "policy_gradient_loss",
    "position_ids",
    "ranking_loss",
    "ranking_pairs",
    "reward_to_go",
    "rl_gain",
    "sample_token",
    "sequence_kl",
    "side_by_side",
    "token_entropy",
    "token_logprobs",
    "token_rewards",
    "whiten",
    "whole_answer",
    "wilson_interval",
    "win_rate",
]
