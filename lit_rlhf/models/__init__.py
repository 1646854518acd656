"""Neural networks: loading, heads, log-probs, the reference, model folders."""

from lit_rlhf.models.answer_scorers import (
    AnswerScorer as AnswerScorer,
    Classifier as Classifier,
    ScorerEnsemble as ScorerEnsemble,
    TextRewardModel as TextRewardModel,
    load_scorer as load_scorer,
    load_scorer_tokenizer as load_scorer_tokenizer,
)
from lit_rlhf.models.checkpoint import save_model as save_model
from lit_rlhf.models.heads import (
    critic_from_policy as critic_from_policy,
    critic_from_reward_model as critic_from_reward_model,
    critic_on_policy as critic_on_policy,
    load_reward_model as load_reward_model,
    reward_model_from_config as reward_model_from_config,
    score_answers as score_answers,
)
from lit_rlhf.models.kernels import use_kernels as use_kernels
from lit_rlhf.models.logits import next_token_logits as next_token_logits
from lit_rlhf.models.lora import LoRA as LoRA, add_lora as add_lora
from lit_rlhf.models.policy import (
    end_tokens as end_tokens,
    load_policy as load_policy,
    load_policy_and_tokenizer as load_policy_and_tokenizer,
    packed_hidden as packed_hidden,
    policy_from_config as policy_from_config,
)
from lit_rlhf.models.reward_head import RewardHead as RewardHead
