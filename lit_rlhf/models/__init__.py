"""Neural networks: loading, heads, log-probs, the reference, model folders."""

from lit_rlhf.models.adapters import (
    adapters_off as adapters_off,
    effective_weight as effective_weight,
    lora_layers as lora_layers,
    merged as merged,
    plain_weights as plain_weights,
)
from lit_rlhf.models.checkpoint import fingerprint as fingerprint, save_model as save_model
from lit_rlhf.models.chunked import (
    adds_to_gradients as adds_to_gradients,
    by_token as by_token,
    token_logprobs_of as token_logprobs_of,
)
from lit_rlhf.models.heads import (
    Critic as Critic,
    CriticFactory as CriticFactory,
    critic_from_policy as critic_from_policy,
    critic_from_reward_model as critic_from_reward_model,
    critic_on_policy as critic_on_policy,
    head_parameters as head_parameters,
    kept_language_model as kept_language_model,
    load_reward_model as load_reward_model,
    packed_scores as packed_scores,
    reward_model_from_config as reward_model_from_config,
    score_answers as score_answers,
    score_mean as score_mean,
    score_shift as score_shift,
    score_std as score_std,
    scores_and_hidden as scores_and_hidden,
    scores_of as scores_of,
    sequence_classifier as sequence_classifier,
)
from lit_rlhf.models.kernels import use_kernels as use_kernels
from lit_rlhf.models.logits import next_token_logits as next_token_logits
from lit_rlhf.models.lora import (
    LoRA as LoRA,
    add_lora as add_lora,
    learning as learning,
    save_adapter as save_adapter,
    starts_unchanged as starts_unchanged,
    train_adapters as train_adapters,
)
from lit_rlhf.models.micro_batches import tokens_at_once as tokens_at_once
from lit_rlhf.models.policy import (
    context_length as context_length,
    end_tokens as end_tokens,
    freeze as freeze,
    layers as layers,
    load_policy as load_policy,
    load_policy_and_tokenizer as load_policy_and_tokenizer,
    packed_hidden as packed_hidden,
    policy_from_config as policy_from_config,
    predicting_positions as predicting_positions,
    response_positions as response_positions,
    shares_prompts as shares_prompts,
)
from lit_rlhf.models.reference import Reference as Reference, ReferenceUpdate as ReferenceUpdate
from lit_rlhf.models.responses import (
    Responding as Responding,
    response_logprobs as response_logprobs,
    scatter as scatter,
    stacked as stacked,
)
from lit_rlhf.models.reward_head import (
    RewardEnsemble as RewardEnsemble,
    RewardHead as RewardHead,
    RewardTransformer as RewardTransformer,
    ScoreHead as ScoreHead,
)
from lit_rlhf.models.text_rows import TextRows as TextRows, check_rows as check_rows, text_loss as text_loss
