"""Tokenizers: trained on the user's text, or loaded. All are Hugging Face's, and all are lossless."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import Field
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lit_rlhf.errors import UserError

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

# Words with the space before them, then each digit alone (also with its space): "12" is always "1", "2", so that
# sums are spelled alike wherever they stand. Nothing is dropped, so decoding gives the text back.
WORD_PATTERN = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def train_bpe(texts: Iterable[str], vocab_size: Annotated[int, Field(ge=264)] = 1024) -> PreTrainedTokenizerBase:
    """Byte-level BPE (GPT-2, section 2.2) learned from ``texts``; any string can be written with it.

    ``vocab_size`` counts the 256 bytes, the special tokens and the merges; a small text may yield fewer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer)


def train_characters(texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """One token a character of ``texts``. A character that they do not hold cannot be written: it becomes <|unk|>."""
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    vocabulary = {token: i for i, token in enumerate([END_OF_TEXT, PAD, *ROLES, "<|unk|>", *sorted(characters)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer, unk_token="<|unk|>")


def _wrap(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,
        **special,
    )


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder (or, with a network, of a Hub name) and give it a padding token.

    Padding and end-of-text must differ, else end-of-text is never learned and pooling finds the wrong token; where
    they are the same, or there is no padding token, ``<|pad|>`` is added (the policy loader grows the embedding)."""
    path = str(path)
    if path.startswith((".", "/")) and not Path(path).is_dir():
        raise UserError(f"{path}: no such folder, where a tokenizer was expected")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path}: no tokenizer could be loaded from there ({_first_line(error)}). Give a folder that holds one "
            "(tokenizer.json, or vocab.json and merges.txt), or a Hub name where there is a network."
        ) from error
    if tokenizer.eos_token is None:
        raise UserError(f"{path}: the tokenizer has no end-of-text token (eos_token); set one in tokenizer_config.json")
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
