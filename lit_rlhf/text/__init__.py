"""Strings and tokens: tokenizers, chat templates, records, packing, the built-in world."""

from lit_rlhf.text.chat import (
    Transcript as Transcript,
    encode_dialogues as encode_dialogues,
    encode_prompts as encode_prompts,
    encode_responses as encode_responses,
    ensure_chat_template as ensure_chat_template,
    is_base as is_base,
)
from lit_rlhf.text.classifier_inputs import (
    add_classifier_tokens as add_classifier_tokens,
    encode_inputs as encode_inputs,
    input_texts as input_texts,
)
from lit_rlhf.text.packing import Packed as Packed, left_pad as left_pad, pack as pack, stream as stream
from lit_rlhf.text.tokenizer import (
    load_tokenizer as load_tokenizer,
    train_bpe as train_bpe,
    train_characters as train_characters,
)
from lit_rlhf.text.transcripts import (
    HUMAN_TRANSCRIPT as HUMAN_TRANSCRIPT,
    WORLD_TRANSCRIPT as WORLD_TRANSCRIPT,
    transcript_for as transcript_for,
)
