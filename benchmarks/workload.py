"""Models and texts that the benchmarks work on: made here, from a seed, the same for both sides.

Speed does not depend on what a model has learned but on its shape and on how long texts are. So the models are fresh,
all words are alike, and the chance of an answer to end is set by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lit_rlhf.text.chat import ensure_chat_template
from lit_rlhf.text.tokenizer import ROLES

VOCABULARY = 2048
PAD, END = "<pad>", "<eos>"
NEVER = 1e-12  # chance of a token to be the last, where answers have full length
LONGEST_PROMPT, SHORTEST_PROMPT = 32, 8  # tokens


class Shape(NamedTuple):
    """Of a GPT-2."""

    layers: int
    width: int
    heads: int

    def forward_flops(self, tokens: int, logits: int = 0) -> int:
        """Useful floating-point operations of a forward pass over a sequence of ``tokens``, cached or at once.

        2 a weight and token for the matrices (attention 4 d^2 and MLP 8 d^2 a layer), 4 d a layer for each token that
        a token attends to, itself included, and 2 d V for each token whose logits are asked for. Norms, activations,
        softmax and all that is done for padding count as nothing; all that the formula asks for counts, also where an
        implementation finds a way around it. A backward pass takes twice as many."""
        seen = tokens * (tokens + 1) // 2
        matrices = 2 * 12 * self.layers * self.width**2 * tokens
        return matrices + 4 * self.width * self.layers * seen + 2 * self.width * VOCABULARY * logits

    def config(self, context: int, activation: str, **tokens: int | None) -> PretrainedConfig:
        """For texts of ``context`` tokens; ``activation`` is GPT-2's own, ``tokens`` are the special ones."""
        return GPT2Config(
            vocab_size=VOCABULARY, n_positions=context, n_layer=self.layers, n_embd=self.width, n_head=self.heads,
            activation_function=activation, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, num_labels=1, **tokens,
        )  # fmt: skip


class LlamaShape(NamedTuple):
    """Of a Llama with tied embeddings, as many a checkpoint that people start from."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    inner: int  # width of the gated MLP
    vocabulary: int  # tokens; the texts use VOCABULARY of them

    def config(self, context: int, activation: str, **tokens: int | None) -> PretrainedConfig:
        """For texts of ``context`` tokens; the ``activation`` is Llama's, whatever is said."""
        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=self.inner, num_labels=1,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            max_position_embeddings=context, tie_word_embeddings=True, **tokens,
        )  # fmt: skip


SHAPES: dict[str, Shape | LlamaShape] = {
    "S": Shape(4, 128, 4),
    "M": Shape(5, 224, 4),
    "L": Shape(6, 384, 6),
    "135M": LlamaShape(30, 576, 9, 3, 1536, 49152),  # SmolLM2-135M's
}


def word_tokenizer(words: int, roles: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """One token a word, w0, w1, ...; then padding, end-of-text and ``roles``."""
    tokens = [*(f"w{i}" for i in range(words)), PAD, END, *roles]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, additional_special_tokens=list(roles),
        padding_side="left",
    )  # fmt: skip


def chat_tokenizer() -> PreTrainedTokenizerBase:
    """Of the whole vocabulary, with a chat template."""
    tokenizer = word_tokenizer(VOCABULARY - 2 - len(ROLES), ROLES)
    ensure_chat_template(tokenizer)
    return tokenizer


def make_models(
    shape: Shape | LlamaShape,
    folder: Path,
    end_chance: float = NEVER,
    activation: str = "gelu_new",
    context: int = 512,
) -> tuple[Path, Path]:
    """Folders of a policy and of a reward model with the same backbone, as anybody's checkpoints: each side loads them.

    ``end_chance`` is the policy's chance of ending at any token, which is 1 in its vocabulary for a Llama, whatever is
    said; ``activation`` is GPT-2's own."""
    torch.manual_seed(0)
    tokenizer = chat_tokenizer()
    end = tokenizer.eos_token_id
    config = shape.config(context, activation, bos_token_id=end, eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    policy = AutoModelForCausalLM.from_config(config)
    reward_model = AutoModelForSequenceClassification.from_config(config)
    reward_model.base_model.load_state_dict(policy.base_model.state_dict())
    with torch.no_grad():
        reward_model.score.weight.normal_(0.0, shape.width**-0.5)  # scores of about 1
        if isinstance(shape, Shape):
            _set_end_chance(policy, end, end_chance)
    paths = folder / "policy", folder / "reward_model"
    for path, model in zip(paths, (policy, reward_model)):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return paths


def _set_end_chance(policy: GPT2LMHeadModel, end: int, chance: float) -> None:
    direction = torch.nn.functional.normalize(torch.randn(policy.config.n_embd), dim=0)
    # What the last norm adds along this direction only end-of-text's embedding reads, all others being orthogonal.
    embedding = policy.transformer.wte.weight
    embedding -= (embedding @ direction)[:, None] * direction
    log_odds = math.log(chance / (1 - chance)) + math.log(VOCABULARY - 1)
    policy.transformer.ln_f.bias += 4 * log_odds * direction  # far above what hidden states vary by
    embedding[end] = direction / 4


def end_chance(longest: int) -> float:
    """Of a token to be the last, in answers that end early: 1 in 33 where an answer has at most 64 tokens. They are
    then 28 long on average, and half of a batch of prompts and answers is padding."""
    return 64 / 33 / longest


def chance(answers: int) -> float:
    """How far, relatively, the total length of ``answers`` sampled answers may be from another such total: 4 standard
    errors of the difference. The standard deviation of one length is about 0.75 of its mean."""
    return 4 * 0.75 * math.sqrt(2 / answers)


class Lengths:
    """Lengths of prompts and answers, drawn from a seed: answers as those of a policy that ends early."""

    def __init__(self, seed: int, longest_answer: int) -> None:
        self.random, self.longest_answer = Random(seed), longest_answer

    def prompt(self) -> int:
        return self.random.randint(SHORTEST_PROMPT, LONGEST_PROMPT)

    def answer(self) -> int:
        """End-of-text included."""
        left = 1 - self.random.random()  # above 0
        return min(self.longest_answer, 1 + int(math.log(left) / math.log1p(-end_chance(self.longest_answer))))


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Token lists of unequal lengths."""
    lengths = Lengths(seed, 1)
    return [[lengths.random.randrange(VOCABULARY - 5) for _ in range(lengths.prompt())] for _ in range(count)]


def words(count: int, random: Random) -> str:
    return " ".join(f"w{random.randrange(VOCABULARY - 5)}" for _ in range(count))


def write_text(path: Path, tokens: int) -> Path:
    """One document of ``tokens`` words."""
    path.write_text(words(tokens, Random(0)), encoding="utf-8")
    return path


def write_answers(path: Path, records: int, answers: int, longest: int = 64) -> Path:
    """Records of a prompt and ``answers`` ranked answers to it, or of one answer where ``answers`` is 1.

    Tokens of template and end-of-text are taken off the words, so that lengths are those of :class:`Lengths`."""
    lengths = Lengths(0, longest)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(records):
            prompt = words(lengths.prompt() - 2, lengths.random)
            texts = [words(max(1, lengths.answer() - 1), lengths.random) for _ in range(answers)]
            record = {"prompt": prompt, "response": texts[0]}
            if answers > 1:
                record = {"prompt": prompt, "responses": texts, "ranks": list(range(1, answers + 1))}
            file.write(json.dumps(record) + "\n")
    return path
