"""Strings and tokens: tokenizers, chat templates, records, packing, the built-in world."""

from lit_rlhf.text.chat import encode_dialogues, encode_prompts, encode_responses, ensure_chat_template
from lit_rlhf.text.packing import Packed, left_pad, pack, stream
from lit_rlhf.text.readings import add_reading_tokens, encode_readings, readings
from lit_rlhf.text.records import (
    Demonstration,
    LabelledText,
    Messages,
    MultipleChoice,
    OpenQuestion,
    Ranking,
    Similarity,
    load_records,
    parse_demonstration,
    parse_labelled,
    parse_prompt,
    parse_ranking,
    parse_task,
    parse_text,
    split_by_prompt,
    write_jsonl,
)
from lit_rlhf.text.tokenizer import load_tokenizer, train_bpe, train_characters

__all__ = [
    "Demonstration",
    "LabelledText",
    "Messages",
    "MultipleChoice",
    "OpenQuestion",
    "Packed",
    "Ranking",
    "Similarity",
    "add_reading_tokens",
    "encode_dialogues",
    "encode_prompts",
    "encode_readings",
    "encode_responses",
    "ensure_chat_template",
    "left_pad",
    "load_records",
    "load_tokenizer",
    "pack",
    "parse_demonstration",
    "parse_labelled",
    "parse_prompt",
    "parse_ranking",
    "parse_task",
    "parse_text",
    "readings",
    "split_by_prompt",
    "stream",
    "train_bpe",
    "train_characters",
    "write_jsonl",
]
