"""Strings and tokens: tokenizers, chat templates, records, packing, the built-in world."""

from lit_rlhf.text.chat import (
    Transcript as Transcript,
    encode_dialogues as encode_dialogues,
    encode_prompts as encode_prompts,
    encode_responses as encode_responses,
    ensure_chat_template as ensure_chat_template,
    is_base as is_base,
)
from lit_rlhf.text.packing import pack as pack
from lit_rlhf.text.tokenizer import (
    load_tokenizer as load_tokenizer,
    train_bpe as train_bpe,
    train_characters as train_characters,
)
from lit_rlhf.text.transcripts import transcript_for as transcript_for
