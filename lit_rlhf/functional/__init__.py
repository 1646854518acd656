"""Pure tensor math: every equation of the method, each with its source. Imports torch only.

Shapes: B sequences (or N answers), T tokens, V vocabulary. Log-probs are in nats. Masks are True where a
position counts."""

from lit_rlhf.functional.advantage import gae, token_rewards
from lit_rlhf.functional.kl import sequence_kl
from lit_rlhf.functional.lm import lm_loss, token_entropy, token_logprobs
from lit_rlhf.functional.masking import last_position, masked_mean, masked_sum, position_ids, whiten
from lit_rlhf.functional.ppo import clip_fraction, clipped_policy_loss, clipped_value_loss, explained_variance
from lit_rlhf.functional.preference import Pairs, pair_accuracy, ranking_loss, ranking_pairs
from lit_rlhf.functional.rating import WinRate, best_of_n, pairwise_wins, win_rate
from lit_rlhf.functional.sampling import filter_logits, sample_token

__all__ = [
    "Pairs",
    "WinRate",
    "best_of_n",
    "clip_fraction",
    "clipped_policy_loss",
    "clipped_value_loss",
    "explained_variance",
    "filter_logits",
    "gae",
    "last_position",
    "lm_loss",
    "masked_mean",
    "masked_sum",
    "pair_accuracy",
    "pairwise_wins",
    "position_ids",
    "ranking_loss",
    "ranking_pairs",
    "sample_token",
    "sequence_kl",
    "token_entropy",
    "token_logprobs",
    "token_rewards",
    "whiten",
    "win_rate",
]
