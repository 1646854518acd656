"""Labelled records, and how a classifier reads them."""

import pytest
from transformers import AutoTokenizer

from lit_rlhf.text.classifier_inputs import add_classifier_tokens, encode_inputs, input_texts
from lit_rlhf.text.records import (
    LabelledText,
    MultipleChoice,
    OpenQuestion,
    Similarity,
    parse_labelled,
    parse_task,
    task_prompt,
)


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"text": "t", "label": "pos"}, LabelledText(("t",), "pos")),
        ({"text": "t", "label": 0}, LabelledText(("t",), "0")),
        ({"text": "t", "label": 1.0}, LabelledText(("t",), "1")),
        ({"text": "t", "label": True}, LabelledText(("t",), "True")),
        ({"premise": "p", "hypothesis": "h", "label": "no"}, LabelledText(("p", "h"), "no")),
        ({"text_a": "a", "text_b": "b", "label": 1}, Similarity("a", "b", "1")),
        ({"context": "c", "choices": ["x", "y"], "label": 1}, MultipleChoice("c", ("x", "y"), 1)),
        ({"context": "c", "choices": ["x", "y"], "label": 1.0}, MultipleChoice("c", ("x", "y"), 1)),
        ({"prompt": "c", "choices": ["x", "y"], "label": "x"}, MultipleChoice("c", ("x", "y"), 0)),
        ({"context": "c", "choices": ["1", "0"], "label": "0"}, MultipleChoice("c", ("1", "0"), 1)),
    ],
)
def test_labelled(row, record):
    assert parse_labelled(row) == parse_task(row) == record


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"prompt": "q", "response": "a"}, OpenQuestion("q", ("a",))),
        ({"prompt": "q", "answers": ["a", "b"]}, OpenQuestion("q", ("a", "b"))),
        ({"instruction": "i", "input": "x", "output": "a"}, OpenQuestion("i\n\nx", ("a",))),
    ],
)
def test_open_question(row, record):
    assert parse_task(row) == record


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"label": 1}, "no field 'text'"),
        ({"text": " ", "label": 1}, "'text' is ' '"),
        ({"text": "t"}, "no field 'label'"),
        ({"text": "t", "label": ""}, "'label' is ''; a name or a whole number"),
        ({"text": "t", "label": 0.5}, "'label' is 0.5"),
        ({"text_a": "a", "label": 1}, "no field 'text_b'"),
        ({"premise": "a", "label": 1}, "no field 'hypothesis'"),
        ({"context": "c", "choices": ["x"], "label": 0}, "a list of two or more"),
        ({"context": "c", "choices": ["x", ""], "label": 0}, "non-empty strings"),
        ({"context": "c", "choices": ["x", "x"], "label": 0}, "two of them are the same"),
        ({"context": "c", "choices": ["x", "y"], "label": 2}, "index from 0 to 1"),
        ({"context": "c", "choices": ["x", "y"], "label": "z"}, "'label' is 'z'"),
        ({"choices": ["x", "y"], "label": 0}, "no field 'prompt'"),
    ],
)
def test_what_is_no_labelled_record(row, reason):
    with pytest.raises(ValueError, match=reason.replace("(", r"\(")):
        parse_labelled(row)


def test_an_open_question_needs_an_answer():
    for row in ({"prompt": "q"}, {"prompt": "q", "answers": []}, {"prompt": "q", "response": " "}):
        with pytest.raises(ValueError, match=r"answers|response"):
            parse_task(row)


def test_the_split_looks_at_the_question():
    records = [LabelledText(("q", "h"), "1"), MultipleChoice("q", ("x", "y"), 0), Similarity("q", "b", "1")]
    assert all(task_prompt(r) == [{"role": "user", "content": "q"}] for r in (*records, OpenQuestion("q", ("a",))))


def test_what_is_read():
    assert input_texts(LabelledText(("p", "h"), "1")) == [("p", "h")]
    assert input_texts(Similarity("a", "b", "1")) == [("a", "b"), ("b", "a")]
    assert input_texts(MultipleChoice("c", ("x", "y"), 0)) == [("c", "x"), ("c", "y")]


def test_tokens_stand_around_the_texts_and_a_saved_tokenizer_puts_them_itself(tokenizer, tmp_path):
    before = len(tokenizer)
    add_classifier_tokens(tokenizer)
    add_classifier_tokens(tokenizer)  # once only
    assert len(tokenizer) == before + 3
    (one, _), (two, _) = encode_inputs(tokenizer, [("the cat",), ("the cat", "42")], 64)
    assert tokenizer.decode(one) == "<|start|>the cat<|extract|>"
    assert tokenizer.decode(two) == "<|start|>the cat<|delimiter|>42<|extract|>"
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("the cat")["input_ids"] == one
    assert loaded("the cat", "42")["input_ids"] == two


def test_a_long_text_loses_its_beginning_then_the_second_its_end(tokenizer):
    add_classifier_tokens(tokenizer)

    def cut(texts, length):
        [(tokens, long)] = encode_inputs(tokenizer, [texts], length)
        assert len(tokens) <= length
        return tokenizer.decode(tokens), long

    assert cut(("0123",), 6) == ("<|start|>0123<|extract|>", False)
    assert cut(("0123",), 5) == ("<|start|>123<|extract|>", True)
    assert cut(("0123", "45"), 9) == ("<|start|>0123<|delimiter|>45<|extract|>", False)
    assert cut(("0123", "45"), 8) == ("<|start|>123<|delimiter|>45<|extract|>", True)
    assert cut(("0123", "456789"), 8) == ("<|start|><|delimiter|>45678<|extract|>", True)
