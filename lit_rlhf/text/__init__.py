"""Strings and tokens: tokenizers, chat templates, records, packing, the built-in world."""

from lit_rlhf.text.chat import (
    Transcript,
    encode_dialogues,
    encode_prompts,
    encode_responses,
    ensure_chat_template,
    is_base,
)
from lit_rlhf.text.packing import Packed, left_pad, pack, stream
from lit_rlhf.text.records import (
    Demonstration,
    Feedback,
    Messages,
    Ranking,
    load_records,
    parse_demonstration,
    parse_feedback,
    parse_messages,
    parse_prompt,
    parse_ranking,
    parse_text,
    split_by_prompt,
    write_jsonl,
)
from lit_rlhf.text.tokenizer import load_tokenizer, train_bpe, train_characters

__all__ = [
    "Demonstration",
    "Feedback",
    "Messages",
    "Packed",
    "Ranking",
    "Transcript",
    "encode_dialogues",
    "encode_prompts",
    "encode_responses",
    "ensure_chat_template",
    "is_base",
    "left_pad",
    "load_records",
    "load_tokenizer",
    "pack",
    "parse_demonstration",
    "parse_feedback",
    "parse_messages",
    "parse_prompt",
    "parse_ranking",
    "parse_text",
    "split_by_prompt",
    "stream",
    "train_bpe",
    "train_characters",
    "write_jsonl",
]
