"""A small task for both trainers: random walks on a ring of words, and a score for walks that stay in the east.

Everything is made here in seconds: a tokenizer of 26 tokens, a policy that has learned to walk, a reward model that has
learned where east is and is frozen from there on, and prompts of unequal lengths."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer
from workload import word_tokenizer

from trl_comparison.ours import ADAM_BETAS, CLIP, GAMMA, KL_COEF, LAM, MISSING_EOS, VALUE_CLIP, VALUE_COEF

WORDS, PAD, EOS = 24, 24, 25  # the words are the tokens 0 to 23
LONGEST_PROMPT, LONGEST_ANSWER = 8, 16  # tokens


@dataclass
class Task:
    """What both trainers start from."""

    tokenizer: PreTrainedTokenizerBase
    policy: PreTrainedModel
    reward_model: PreTrainedModel
    prompts: list[list[int]]

    def models(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        """Copies (policy, reward model) to train with."""
        return copy.deepcopy(self.policy), copy.deepcopy(self.reward_model)


def make_task(prompts: int = 512, steps: int = 300, seed: int = 0) -> Task:
    """The task, the same one for all seeds of a training: ``steps`` is what policy and reward model are trained for."""
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "vocab_size": WORDS + 2, "pad_token_id": PAD, "eos_token_id": EOS,
        "bos_token_id": None,
    }  # fmt: skip
    policy = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings))
    reward_model = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("llama", num_labels=1, **settings)
    )
    for model in (policy, reward_model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            loss = lm_loss(policy, *walks(64)) if model is policy else score_loss(reward_model, *walks(64))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    tokens, lengths = walks(prompts)
    cuts = torch.minimum(torch.randint(2, LONGEST_PROMPT + 1, (prompts,)), lengths - 1).tolist()
    return Task(
        word_tokenizer(WORDS), policy.eval(), reward_model.eval(), [row[:n] for row, n in zip(tokens.tolist(), cuts)]
    )


def walks(count: int) -> tuple[Tensor, Tensor]:
    """(tokens, lengths) of ``count`` walks: steps of -2 to 2 round the ring, ended with a chance of 1 in 9 a step."""
    longest = LONGEST_PROMPT + LONGEST_ANSWER
    tokens = (torch.randint(WORDS, (count, 1)) + torch.randint(-2, 3, (count, longest)).cumsum(1)) % WORDS
    lengths = (torch.empty(count).geometric_(1 / 9).long() + 3).clamp(max=longest)
    place = torch.arange(longest)
    tokens = tokens.masked_fill(place == lengths[:, None] - 1, EOS)
    return tokens.masked_fill(place >= lengths[:, None], PAD), lengths


def lm_loss(policy: PreTrainedModel, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Padding is no target, so the policy learns never to write it."""
    logits = policy(input_ids=tokens, attention_mask=(tokens != PAD).long()).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=PAD)


def score_loss(reward_model: PreTrainedModel, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Squared error, at every token, of 2 times the mean easting of the words so far."""
    is_word = tokens < WORDS
    easting = torch.where(is_word, (tokens * (2 * math.pi / WORDS)).cos(), 0.0)
    target = 2 * easting.cumsum(1) / is_word.cumsum(1).clamp(min=1)
    hidden = reward_model.model(input_ids=tokens, attention_mask=(tokens != PAD).long()).last_hidden_state
    return (reward_model.score(hidden).squeeze(-1) - target)[tokens != PAD].pow(2).mean()


def trl_trainer(
    task: Task, policy: PreTrainedModel, reference: PreTrainedModel, critic: PreTrainedModel, **settings: Any
) -> PPOTrainer:
    """TRL's trainer on ``task``; ``settings`` are PPOConfig's."""
    config = PPOConfig(
        **{
            "output_dir": tempfile.gettempdir(), "report_to": "none", "use_cpu": True, "bf16": False,
            "gradient_checkpointing": False, "save_strategy": "no", "num_sample_generations": 0, "disable_tqdm": True,
            "lr_scheduler_type": "constant", "adam_beta2": ADAM_BETAS[1], "weight_decay": 0.0, "stop_token": "eos",
            "temperature": 1.0, "response_length": LONGEST_ANSWER, "missing_eos_penalty": MISSING_EOS,
            "kl_coef": KL_COEF, "cliprange": CLIP, "cliprange_value": VALUE_CLIP, "vf_coef": VALUE_COEF,
            "gamma": GAMMA, "lam": LAM, "local_rollout_forward_batch_size": 512,
            **settings,
        }
    )  # fmt: skip
    return PPOTrainer(
        config, task.tokenizer, policy, reference, task.reward_model,
        Dataset.from_dict({"input_ids": task.prompts}), critic,
        # TRL makes a loader of it even where nothing is evaluated.
        eval_dataset=Dataset.from_dict({"input_ids": task.prompts[:1]}),
    )  # fmt: skip


def train_quietly(trainer: PPOTrainer) -> None:
    """``trainer.train()`` without what it prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
