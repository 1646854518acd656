"""Texts as a classifier reads them: <|start|> text <|delimiter|> text <|extract|> (GPT-1, section 3.3, figure 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lit_rlhf.text.records import Labelled, LabelledText, MultipleChoice, Similarity
from lit_rlhf.text.special_tokens import SpecialTokens, encode_texts

START, DELIMITER, EXTRACT = "<|start|>", "<|delimiter|>", "<|extract|>"


def add_classifier_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give ``tokenizer`` the three tokens, and let it put them around a text, or two, by itself.

    A model that is loaded with it later reads a text as it was trained to, whoever calls it."""
    tokens = [AddedToken(token, special=True, normalized=False) for token in (START, DELIMITER, EXTRACT)]
    tokenizer.add_tokens(tokens, special_tokens=True)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return  # one that is written in Python puts nothing around a text
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{START} $A {EXTRACT}",
        pair=f"{START} $A {DELIMITER} $B {EXTRACT}",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in (START, DELIMITER, EXTRACT)],
    )


def input_texts(record: Labelled) -> list[tuple[str, ...]]:
    """The texts of a record's inputs, each one or two with a delimiter between.

    A labelled text is read once, two similar texts in both orders, a question once with each of its choices."""
    if isinstance(record, LabelledText):
        return [record.texts]
    if isinstance(record, Similarity):
        return [(record.text_a, record.text_b), (record.text_b, record.text_a)]
    assert isinstance(record, MultipleChoice)
    return [(record.context, choice) for choice in record.choices]


def encode_inputs(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[str, ...]],
    max_length: int,
    special_tokens: SpecialTokens = "plain",
) -> list[tuple[list[int], bool]]:
    """(tokens, whether it was too long) of each input, the three special tokens included.

    Where there are more than ``max_length`` tokens, the beginning of the first text is dropped, then the end of the
    second."""
    start, delimiter, extract = cast(list[int], tokenizer.convert_tokens_to_ids([START, DELIMITER, EXTRACT]))
    flat = [text for group in texts for text in group]
    encoded = iter(encode_texts(tokenizer, flat, special_tokens))
    found = []
    for group in texts:
        first, *rest = [next(encoded) for _ in group]
        room = max_length - 2 - len(rest)
        behind = [token for text in rest for token in (delimiter, *text[:room])]
        left = room - (len(behind) - len(rest))
        tokens = [start, *(first[-left:] if left > 0 else []), *behind, extract]
        found.append((tokens, len(first) > left or any(len(text) > room for text in rest)))
    return found
