"""Pure tensor math: every equation of the method, each with its source and an example. Imports torch only.

Shapes: B sequences (or N answers), T tokens, V vocabulary. Log-probs are in nats. Masks are True where a
position counts."""

from lit_rlhf.functional.advantage import (
    Baseline as Baseline,
    baseline as baseline,
    gae as gae,
    group_std as group_std,
    monte_carlo as monte_carlo,
    reward_to_go as reward_to_go,
    token_rewards as token_rewards,
    whole_answer as whole_answer,
)
from lit_rlhf.functional.agreement import (
    cohen_kappa as cohen_kappa,
    krippendorff_alpha as krippendorff_alpha,
    percent_agreement as percent_agreement,
)
from lit_rlhf.functional.classify import (
    added as added,
    classification_loss as classification_loss,
    side_by_side as side_by_side,
)
from lit_rlhf.functional.diversity import (
    distinct_ngrams as distinct_ngrams,
    self_similarity as self_similarity,
    similarity as similarity,
)
from lit_rlhf.functional.gradient_noise import GradientNoise as GradientNoise, gradient_noise as gradient_noise
from lit_rlhf.functional.interval import (
    FEW as FEW,
    Estimate as Estimate,
    ratio as ratio,
    ratio_difference as ratio_difference,
    wilson_interval as wilson_interval,
    window_error as window_error,
)
from lit_rlhf.functional.kl import (
    Estimator as Estimator,
    adapted_kl_coef as adapted_kl_coef,
    full_kl as full_kl,
    kl_estimate as kl_estimate,
    sequence_kl as sequence_kl,
)
from lit_rlhf.functional.length_control import length_controlled_win_rate as length_controlled_win_rate
from lit_rlhf.functional.lm import lm_loss as lm_loss, token_entropy as token_entropy, token_logprobs as token_logprobs
from lit_rlhf.functional.masking import (
    last_position as last_position,
    masked_mean as masked_mean,
    masked_sum as masked_sum,
    moments as moments,
    population_std as population_std,
    position_ids as position_ids,
    power_sums as power_sums,
    std_from_moments as std_from_moments,
    whiten as whiten,
)
from lit_rlhf.functional.orthogonal import orthogonalize as orthogonalize
from lit_rlhf.functional.overoptimization import (
    GainFit as GainFit,
    Method as Method,
    best_of_n_gain as best_of_n_gain,
    expected_best_of_n as expected_best_of_n,
    fit_best_of_n_gain as fit_best_of_n_gain,
    fit_rl_gain as fit_rl_gain,
    peak_kl as peak_kl,
    rl_gain as rl_gain,
)
from lit_rlhf.functional.ppo import (
    adapted_beta as adapted_beta,
    clip_fraction as clip_fraction,
    clipped_policy_loss as clipped_policy_loss,
    clipped_value_loss as clipped_value_loss,
    explained_variance as explained_variance,
    importance_weighted_loss as importance_weighted_loss,
    kl_penalty_loss as kl_penalty_loss,
    policy_gradient_loss as policy_gradient_loss,
)
from lit_rlhf.functional.preference import (
    Calibration as Calibration,
    Pairs as Pairs,
    calibration as calibration,
    correlation as correlation,
    dpo_loss as dpo_loss,
    feedback_loss as feedback_loss,
    implicit_rewards as implicit_rewards,
    pair_accuracy as pair_accuracy,
    ranking_loss as ranking_loss,
    ranking_pairs as ranking_pairs,
)
from lit_rlhf.functional.rating import (
    Ratings as Ratings,
    WinRate as WinRate,
    best_of_n as best_of_n,
    best_of_n_kl as best_of_n_kl,
    bradley_terry as bradley_terry,
    elo as elo,
    pairwise_wins as pairwise_wins,
    ratings as ratings,
    tournament as tournament,
    win_rate as win_rate,
)
from lit_rlhf.functional.sampling import (
    drawn_figures as drawn_figures,
    filter_logits as filter_logits,
    sample_index as sample_index,
)
from lit_rlhf.functional.scores import ScoreScale as ScoreScale, shaped_scores as shaped_scores
