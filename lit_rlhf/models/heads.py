"""Scores from a Transformer: the reward model and the critic.

The plain one is one of Hugging Face's sequence classifiers with one label: a bias-free linear head on the last hidden
state. The reward model reads it at the last token, the critic at every token. Other heads: ``reward_head.py``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import UserError, say
from lit_rlhf.models.adapters import effective_weight, merged
from lit_rlhf.models.classifier_loading import load_classifier
from lit_rlhf.models.finite import finite
from lit_rlhf.models.gathering import gathers
from lit_rlhf.models.loading import (
    Dtype,
    cast_to_intended,
    checkpoint_format,
    copied,
    format_of,
    intend_dtype,
    intended_dtype,
    is_intended,
    keep_format,
    load_config,
    load_language_model,
    match_tokenizer,
)
from lit_rlhf.models.logits import language_model
from lit_rlhf.models.lora import LoRA, add_lora, base_path, check_quantization, holds_score, with_adapter
from lit_rlhf.models.micro_batches import tokens_at_once
from lit_rlhf.models.policy import context_length, packed_hidden, policy_from_config
from lit_rlhf.models.quantization import Quantization, is_quantized, keep_layout, quantized_loading
from lit_rlhf.models.reward_head import (
    RewardEnsemble,
    RewardHead,
    RewardTransformer,
    ScoreHead,
    check_head,
    saved_head,
    score_scale,
    start_head,
    tied_head,
)
from lit_rlhf.text.chat import encode_prompts, encode_responses
from lit_rlhf.text.packing import Packed, pack, runs
from lit_rlhf.text.records import Message, Messages
from lit_rlhf.text.special_tokens import SpecialTokens
from lit_rlhf.text.template_form import Tools
from lit_rlhf.text.tokenizer import check_vocabulary

AnyRewardModel = PreTrainedModel | RewardTransformer | RewardEnsemble


def load_reward_model(
    path: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: Dtype = "float32",
    new_head: bool = False,
    head: RewardHead | None = None,
    lora: LoRA | None = None,
    combine: Literal["mean", "worst"] = "mean",
    export_dtype: Dtype | None = None,
    quantization: Quantization | None = None,
) -> AnyRewardModel:
    """Load a reward model, with adapters where ``lora`` asks for them; from a list of paths, an ensemble.

    It computes in ``dtype``; its export is written in ``export_dtype``, or in the checkpoint's own precision. Errors
    are those of :func:`lit_rlhf.models.classifier_loading.load_classifier` and :func:`match_tokenizer`.

    With ``new_head`` a language model will do, too: its backbone gets the ``head`` (linear, at the last token), fresh.
    Without it, a folder that holds no head raises ``UserError``: its scores would mean nothing. A folder may hold the
    adapter of a reward model. ``quantization``: see :func:`load_policy`; one that is not trained needs no adapters."""
    if not isinstance(path, str | Path):
        members = [load_reward_model(m, tokenizer, dtype, quantization=quantization) for m in path]
        return members[0] if len(members) == 1 else RewardEnsemble(members, combine)
    found, expected = saved_head(path), head or RewardHead()
    adapters = lora is not None and lora.enabled
    if new_head:
        check_quantization(quantization, lora, path)
    if quantization is not None and (found is not None or not expected.is_classifier(load_config(base_path(path)))):
        raise UserError(
            f"{path}: quantization={quantization} is for reward models that are sequence classifiers of transformers: "
            "a family that has one, and the plain head (linear, last)"
        )
    if found is not None:
        if new_head:
            check_head(found, expected, path)
        model: Any = RewardTransformer.from_pretrained(path, getattr(torch, dtype))
        keep_format(model, format_of(path, export_dtype))
    elif new_head and not expected.is_classifier(load_config(base_path(path))):
        if expected.plain:
            say(
                f"{path}: transformers has no sequence classifier of this kind; the reward model is one of ours, and "
                "lit_rlhf.models.load_reward_model loads it"
            )
        policy = load_language_model(base_path(path), dtype, export_dtype)
        if tokenizer is not None:
            match_tokenizer(policy, tokenizer, path, adapters)
        model = RewardTransformer.from_policy(with_adapter(policy, path), expected)
    else:
        model = _load_classifier(path, dtype, expected if new_head else None, export_dtype, quantization)
    if tokenizer is not None:
        check_vocabulary(tokenizer, path)
        match_tokenizer(model, tokenizer, path, adapters)
    return add_lora(model, lora)


def _load_classifier(
    path: str | Path,
    dtype: Dtype,
    new_head: RewardHead | None,
    export_dtype: Dtype | None,
    quantization: Quantization | None,
) -> PreTrainedModel:
    quantized = quantized_loading(quantization, getattr(torch, dtype))
    model: Any
    model, fresh = load_classifier(
        base_path(path), dtype, new_head is not None or holds_score(path), export_dtype, **quantized
    )
    if fresh:
        start = (new_head or RewardHead()).start
        cast_to_intended(model, model.score)
        start_head(model.score, start)
    return with_adapter(keep_layout(model), path)


def reward_model_from_config(
    config: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    head: RewardHead | None = None,
) -> PreTrainedModel | RewardTransformer:
    """A freshly initialized reward model; ``config`` as in ``policy_from_config``."""
    policy = policy_from_config(config, tokenizer)
    head = head or RewardHead()
    if not head.is_classifier(policy.config):
        return RewardTransformer.from_policy(policy, head)
    architecture = policy.config
    architecture.num_labels = 1
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(architecture)  # type: ignore[no-untyped-call]
    score: Any = model.score
    start_head(score, head.start)
    return model


def packed_scores(model: AnyRewardModel, batch: Packed) -> Tensor:
    """Scores (N,) of packed sequences, before they are shifted; one entry for all heads and for ensembles.

    A likelihood head must know where the answers begin: ``batch.response_lengths``."""
    if isinstance(model, RewardEnsemble):
        members = [score_scale(m)(packed_scores(m, batch).float(), divide=True) for m in model.members]
        return model.combined(torch.stack(members))
    return scores_and_hidden(model, batch, batch.ends[:0])[0]


@torch.no_grad()
def scores_of(model: AnyRewardModel, batches: Iterable[Packed], scale: bool = False, center: bool = False) -> Tensor:
    """Scores (N,) of all sequences of packed ``batches``, shifted so that demonstrations average 0.

    ``scale`` divides them by the standard deviation of the scores of sampled answers, ``center`` subtracts their
    mean: see :class:`lit_rlhf.functional.ScoreScale`."""
    read = torch.cat([packed_scores(model, batch).float() for batch in batches])
    return score_scale(model)(finite(read, "the scores of the reward model"), divide=scale, center=center)


@gathers
def scores_and_hidden(model: PreTrainedModel | RewardTransformer, batch: Packed, at: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (N,), and the last hidden states (M, D) of the tokens ``at`` (M,), flat indices."""
    if isinstance(model, RewardTransformer):
        scores, hidden = model.scores_and_hidden(batch)
        return scores, hidden[at]
    hidden = packed_hidden(model, batch, at=torch.cat([batch.ends, at]))
    last, others = torch.split(hidden, [len(batch.ends), len(at)])
    head: Any = model.score
    return head(last).squeeze(-1), others


def kept_language_model(model: PreTrainedModel | RewardTransformer) -> PreTrainedModel:
    """The language model in a reward model, whose weights it shares.

    Raises ``UserError`` where none was kept: the output embedding is neither the input's nor a likelihood head's."""
    backbone: Any = model.base_model
    head = getattr(model.score, "lm_head", None)
    if head is None and not getattr(model.config, "tie_word_embeddings", False):
        raise UserError(f"{type(backbone).__name__}: its output embedding is not its input embedding")
    return language_model(backbone, tied_head(backbone) if head is None else head)


@torch.no_grad()
def score_sequences(
    model: AnyRewardModel,
    sequences: Sequence[Sequence[int]],
    lengths: Sequence[int] | None,
    pad_id: int,
    batch_size: int = 64,
    watched: Callable[[list[slice]], Iterable[slice]] = iter,
) -> Tensor:
    """Scores (N,) of token sequences, each a prompt and an answer of ``lengths`` (N,) tokens, shifted so that
    demonstrations average 0. Of what does not fit into the model's context the end is read.

    ``lengths`` may be None for heads that need not know where an answer begins; ``watched`` shows progress."""
    room, device = context_length(model), next(model.parameters()).device
    fitting = [sequence[-room:] for sequence in sequences]
    # A token stays before the answer: it predicts the first.
    answers = None if lengths is None else [min(length, room - 1) for length in lengths]
    parts = runs([len(s) for s in fitting], tokens_at_once(model, learning=False), batch_size)
    batches = (pack(fitting[p], pad_id, None if answers is None else answers[p]).to(device) for p in watched(parts))
    return scores_of(model, batches)


def score_answers(
    model: AnyRewardModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    responses: Sequence[str | Message],
    batch_size: int = 64,
    tools: Sequence[Tools] | None = None,
    special_tokens: SpecialTokens = "plain",
) -> Tensor:
    """Scores (N,) of one answer to each of N prompts, shifted so that demonstrations average 0; on the CPU.

    ``tools`` are those of each prompt. ``special_tokens``: what their names mean in what people wrote. Of what does not
    fit into the model's context the end is read."""
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses: one for each was expected")
    before = encode_prompts(tokenizer, prompts, tools, special_tokens=special_tokens)
    answers = encode_responses(tokenizer, prompts, responses, tools, special_tokens=special_tokens)
    sequences = [[*p, *r] for p, r in zip(before, answers)]
    return score_sequences(model, sequences, [len(r) for r in answers], tokenizer.pad_token_id, batch_size).cpu()


def sequence_classifier(policy: PreTrainedModel, head: nn.Linear, labels: Sequence[str]) -> PreTrainedModel:
    """``policy``'s backbone (adapters merged) and ``head``, bias-free, as one of Hugging Face's sequence classifiers.

    It reads the head at the last token that is not padding. ``labels`` name the head's outputs."""
    backbone = merged(policy)
    config = copy.deepcopy(backbone.config)
    config.num_labels = head.out_features
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    config.problem_type = "single_label_classification" if head.out_features > 1 else None
    make: Any = AutoModelForSequenceClassification.from_config
    model: PreTrainedModel = make(config, dtype=backbone.dtype)
    model.base_model.load_state_dict(backbone.base_model.state_dict())
    model.get_submodule("score").load_state_dict(head.state_dict())
    keep_format(model, checkpoint_format(policy))
    return model


class Critic(nn.Module):
    """The value of the state before each next token: a head on a backbone of its own, or a linear one on the policy's.

    Args:
        backbone: its own; None: it reads the policy's states.
        head: on the last hidden states.
        begins_as: the reward model that it is a copy of, whose scores :meth:`in_units` turns into values.
    """

    factor, shift = 1.0, 0.0  # value = factor * what the head says + shift

    def __init__(
        self,
        backbone: PreTrainedModel | None,
        head: nn.Linear | ScoreHead,
        begins_as: PreTrainedModel | RewardTransformer | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.score_scale = None if begins_as is None else score_scale(begins_as)

    def in_units(self, weight: float, scaled: bool, mean: float) -> None:
        """Begin with values in the units of what is learned from: ``weight * ((score + shift) / std - mean)``.

        ``scaled``: whether scores are divided by the reward model's own ``score_std``."""
        if self.score_scale is not None:
            self.factor = weight / self.score_scale.std if scaled else weight
            self.shift = self.factor * self.score_scale.shift - weight * mean

    def forward(self, packed: Packed, at: Tensor, policy_hidden: Tensor | None) -> Tensor:
        """Values (M,) at the tokens ``at`` (M,), flat indices.

        The policy's states there, (M, D), serve a shared backbone; another needs none."""
        if isinstance(self.head, ScoreHead) and self.backbone is not None:  # which may look at all tokens of a sequence
            said: Tensor = self.head.values(packed_hidden(self.backbone, packed), packed, self.backbone)[at]
        else:
            hidden = policy_hidden if self.backbone is None else packed_hidden(self.backbone, packed, at=at)
            said = self.head(hidden).squeeze(-1)
        return self.factor * said.float() + self.shift

    values = gathers(forward)  # the same of a critic that may be sharded


def head_parameters(model: PreTrainedModel | RewardTransformer | Critic) -> list[nn.Parameter]:
    """The head of a reward model or critic, without a language-modelling head that came with the backbone."""
    head: Any = model.head if isinstance(model, Critic) else model.score
    return [p for name, p in head.named_parameters() if not name.startswith("lm_head.")]


CriticFactory = Callable[[PreTrainedModel, Any], Critic]


def critic_from_reward_model(policy: PreTrainedModel, reward_model: Any, lora: LoRA | None = None) -> Critic:
    """Critic initialized from the reward model (InstructGPT, appendix C.4), or from the first member of an ensemble.

    A reward model that does not read the policy's tokens cannot be a critic: it is initialized from the policy then,
    and a line says so. ``lora`` gives it adapters."""
    if reward_model is None:
        raise UserError(
            "critic=critic_from_reward_model (ppo/critic=reward_model) needs a reward model, and there is none; take "
            "critic_from_policy or critic_on_policy (ppo/critic=policy, ppo/critic=shared)"
        )
    if not isinstance(reward_model, AnyRewardModel):
        say("the critic begins as the policy, for the reward model reads text and not the policy's tokens")
        return critic_from_policy(policy, lora=lora)
    reward_model = reward_model.members[0] if isinstance(reward_model, RewardEnsemble) else reward_model
    critic = _trainable(copied(reward_model), policy, lora)
    return Critic(critic.base_model, critic.score, reward_model)


def critic_from_policy(policy: PreTrainedModel, reward_model: Any = None, lora: LoRA | None = None) -> Critic:
    """A critic that begins as the policy, with a head that values everything 0."""
    backbone = _trainable(copied(merged(policy, quantized=True)), policy, lora)
    return Critic(backbone.base_model, _zero_head(policy))


def _trainable(model: Any, policy: PreTrainedModel, lora: LoRA | None) -> Any:
    """A copy that is to be a critic in the ``policy``'s precision, with adapters where ``lora`` asks for them."""
    if is_quantized(model):
        check_quantization("4bit", lora, "the critic, which begins as they are", "ppo.critic.lora.r")
    else:
        # A frozen model may be in half precision; small steps of one that learns would be rounded away.
        if is_intended(model):
            intend_dtype(model, intended_dtype(policy))
        else:
            cast_to_intended(model).to(intended_dtype(policy))
        model.requires_grad_(True)
    return add_lora(model, lora)


def critic_on_policy(policy: PreTrainedModel, reward_model: Any = None) -> Critic:
    """A value head on the policy's own backbone: no second model, and both losses shape the one there is."""
    return Critic(None, _zero_head(policy))


def _zero_head(policy: PreTrainedModel) -> nn.Linear:
    head = nn.Linear(effective_weight(policy.get_input_embeddings()).shape[1], 1, bias=False)
    nn.init.zeros_(head.weight)
    return head.to(policy.device, intended_dtype(policy))
