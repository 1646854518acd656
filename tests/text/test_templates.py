"""Every chat template of the package trl: what is learned stands behind the very prompt that is asked.

``python tests/text/test_templates.py`` prints the table of docs/templates.md."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.stages.endpoint import harmless
from lit_rlhf.text import encode_dialogues, encode_prompts, encode_responses, train_bpe
from lit_rlhf.text.chat import turn_end
from lit_rlhf.text.template_form import TemplateForm

THERE = find_spec("trl") is not None
FOLDER = Path(find_spec("trl").origin).parent / "chat_templates" if THERE else Path("trl")
TEMPLATES = sorted(FOLDER.glob("*.jinja"))
needs_trl = pytest.mark.skipif(not THERE, reason="needs the package trl, whose templates are tried")

SYSTEM = {"role": "system", "content": "You are the cat."}
TURNS = [("What is it?", "It is 42, I am!"), ("Who are you?", "the cat"), ("?!", "So be it.")]
NAMES = re.compile(r"<[^<>\s]{1,40}>|\[[A-Za-z/]+\]")  # what looks like a special token
GENERATION = re.compile(r"\{%-? *generation *-?%\}")
ENDS_OTHERWISE = ("gptoss", "phi3")  # they end a dialogue in another way where nothing is to follow
NO_SYSTEM = {"gemma", "gemma_training"}  # they refuse a system message


def dialogue(turns, system):
    said = [m for q, a in TURNS[:turns] for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    return [SYSTEM, *said] if system else said


def tokenizer_of(template, own_tokens=True, flagged=True):
    """A tokenizer with the template, and with what looks like a special token in it as one."""
    tokenizer = train_bpe(["What is it? It is 42, I am! Who are you? the cat\n"] * 3, 300)
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    if own_tokens:
        tokenizer.add_tokens(sorted(set(NAMES.findall(tokenizer.chat_template))), special_tokens=flagged)
    return tokenizer


def learned_spans(examples):
    """(tokens before, tokens learned) of each span."""
    for tokens, mask in examples:
        begin = 0
        while begin < len(tokens):
            end = next((i for i in range(begin, len(tokens)) if mask[i] != mask[begin]), len(tokens))
            if mask[begin]:
                yield tokens[:begin], tokens[begin:end]
            begin = end


def asked(tokenizer, messages):
    """What transformers makes of a prompt, in the form of content that the template writes."""
    if TemplateForm(tokenizer).in_parts:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


@needs_trl
@pytest.mark.parametrize("own_tokens", [True, False], ids=["special", "plain"])
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda file: file.stem)
def test_what_is_learned_stands_behind_what_is_asked(template, own_tokens):
    tokenizer = tokenizer_of(template, own_tokens)
    masks = GENERATION.search(tokenizer.chat_template)
    [end] = turn_end(tokenizer) or [tokenizer.eos_token_id]
    for turns in (1, 2, 3):
        for system in (False, True):
            messages = dialogue(turns, system)
            if system and template.stem in NO_SYSTEM:
                with pytest.raises(UserError, match="chat template refuses the dialogue: System role not supported"):
                    encode_dialogues(tokenizer, [messages], [0])
                continue
            [examples] = encode_dialogues(tokenizer, [messages], [0])
            spans = [*learned_spans(examples)]
            answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
            assert len(spans) == len(answers)
            for place, (before, learned) in zip(answers, spans):
                assert before == asked(tokenizer, messages[:place])
                assert before == encode_prompts(tokenizer, [messages[:place]])[0]
                said = tokenizer.decode(learned)
                text = messages[place]["content"]
                response = encode_responses(tokenizer, [messages[:place]], [text])[0]
                assert response[-1] == end and text in tokenizer.decode(response)
                if masks:  # it says itself what is learned, which may leave the end out or go beyond it
                    assert text in said
                    assert not own_tokens or end in learned
                else:
                    assert learned == response and said.count(text) == 1


@needs_trl
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda file: file.stem)
def test_a_developer_is_heard_as_the_system_where_the_template_knows_none(template):
    tokenizer, told = tokenizer_of(template), []
    developer, question = {**SYSTEM, "role": "developer"}, dialogue(1, system=False)[:1]
    if template.stem in NO_SYSTEM:
        with pytest.raises(UserError, match="chat template refuses the dialogue"):
            encode_prompts(tokenizer, [[developer, *question]])
        return
    heard, system = encode_prompts(tokenizer, [[developer, *question], [SYSTEM, *question]], note=told.append)
    assert SYSTEM["content"] in tokenizer.decode(heard)
    assert (told != []) == TemplateForm(tokenizer).developer_as_system
    assert not told or (heard == system and "knows no 'developer'" in told[0])


@needs_trl
@pytest.mark.parametrize("own_tokens", [True, False], ids=["special", "plain"])
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda file: file.stem)
def test_a_turn_that_is_opened_unasked_is_not_learned(template, own_tokens):
    tokenizer, opens = (tokenizer_of(template, own_tokens) for _ in range(2))
    opens.chat_template = "{% set add_generation_prompt = true %}" + tokenizer.chat_template
    dialogues = [dialogue(turns, template.stem not in NO_SYSTEM) for turns in (1, 2, 3)]
    for messages in dialogues:
        assert encode_prompts(opens, [messages[:-1]]) == encode_prompts(tokenizer, [messages[:-1]])
    both = [encode_dialogues(t, dialogues, [0, 0, 0]) for t in (opens, tokenizer)]
    if template.stem.startswith(ENDS_OTHERWISE):
        for [example, *_] in both[0]:
            for _, learned in learned_spans([example]):
                assert "assistant" not in opens.decode(learned)
    else:
        assert both[0] == both[1] and turn_end(opens) == turn_end(tokenizer)


THOUGHTS = {
    "field": {"content": "It is.", "reasoning_content": "because"},
    "inline": {"content": "<think>because</think>It is."},
    "lines": {"content": "<think>\nbecause\n</think>\n\nIt is."},
}


@needs_trl
@pytest.mark.parametrize("form", THOUGHTS)
def test_each_thought_is_opened_once_and_closed_once(form):
    refused = set()
    for template in [file for file in TEMPLATES if "think" in file.read_text(encoding="utf-8")]:
        tokenizer = tokenizer_of(template, flagged=False)  # as <think> is in tokenizers of real models
        answer = {"role": "assistant", **THOUGHTS[form]}
        for earlier in (0, 1):
            messages = [*dialogue(earlier, False), {"role": "user", "content": "Why?"}, answer]
            try:
                [[*_, example]] = encode_dialogues(tokenizer, [messages], [0])
            except UserError as error:
                if form != "field" or "leaves out 'reasoning_content'" not in str(error):
                    assert "behind which it cannot write what an answer thinks" in str(error)
                    refused.add(template.stem)
                continue
            *_, (before, learned) = learned_spans([example])
            assert before == encode_prompts(tokenizer, [messages[:-1]])[0]
            turn = tokenizer.decode(before).rpartition("Why?")[2] + tokenizer.decode(learned)
            tags = re.findall("</?think>", turn)
            assert tags == ["<think>", "</think>"] * (len(tags) // 2)
            assert turn.count("because") == turn.count("It is.") == 1
    assert refused == {"qwen3_5_nothink", "qwen3_5_nothink_training"}


@needs_trl
def test_a_thought_that_an_answer_leaves_open_is_said():
    tokenizer = tokenizer_of(FOLDER / "deepseekv3.jinja", flagged=False)
    question, told = {"role": "user", "content": "q"}, []
    for answer in ("<think>because</think>It is.", "because</think>It is."):
        encode_responses(tokenizer, [[question]], [answer], note=told.append)
    assert not told
    encode_responses(tokenizer, [[question]] * 2, ["It is.", "It is not."], note=told.append)
    [line] = told
    assert "ends a prompt with '<think>', and writes none before an answer" in line


@needs_trl
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda file: file.stem)
def test_no_text_of_a_person_becomes_control(template):
    tokenizer = tokenizer_of(template)
    names = [t.content for t in tokenizer.added_tokens_decoder.values()]
    ids = {*tokenizer.convert_tokens_to_ids(names)}
    # What was thought is taken out of an answer by templates that know <think>.
    forged = "It is " + " and ".join(name for name in names if "think" not in name) + "."
    question = {"role": "user", "content": "?"}
    for encode in (
        lambda text: encode_prompts(tokenizer, [[{"role": "user", "content": text}]])[0],
        lambda text: encode_responses(tokenizer, [[question]], [text])[0],
    ):
        harmless, tokens = encode("It is."), encode(forged)
        assert [t for t in tokens if t in ids] == [t for t in harmless if t in ids]
        assert forged in tokenizer.decode(tokens)


CALLED = {
    "messages": [
        {"role": "user", "content": "3 * 8?"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "c12345678", "type": "function", "function": {
            "name": "multiply", "arguments": {"first": 3, "second": 8}}}]},
        {"role": "tool", "tool_call_id": "c12345678", "name": "multiply", "content": "24"},
        {"role": "assistant", "content": "It is 24."},
    ],
    "tools": [{"type": "function", "function": {"name": "multiply", "description": "a product", "parameters": {
        "type": "object", "properties": {"first": {"type": "integer"}, "second": {"type": "integer"}}}}}],
}  # fmt: skip


@needs_trl
@pytest.mark.parametrize("template", TEMPLATES, ids=lambda file: file.stem)
def test_a_call_is_learned_with_its_arguments_or_refused(template):
    tokenizer = tokenizer_of(template)
    try:
        [examples] = encode_dialogues(tokenizer, [CALLED["messages"]], [1], [CALLED["tools"]])
    except UserError as error:
        assert "leaves out 'tool_calls[0]'" in str(error)
        # DeepSeek R1's writes a call only where there is no content, and then asks for the content.
        assert "tool_calls" not in tokenizer.chat_template or template.stem.startswith("deepseek_r1")
        return
    call, answer = [tokenizer.decode(learned) for _, learned in learned_spans(examples)]
    assert all(word in call for word in ("multiply", "first", "3", "second", "8")) and "24" not in call
    assert "It is 24." in answer and "8" not in answer


OTHER_FAMILIES = [
    "</s>", "<tool_response>", "<sop>", "<eop>", "<EOT>", "<start_of_turn>", "<_user>", "<extra_id_1>", "<SPECIAL_12>",
    "[gMASK]", "[SEP]", "]~b]", "]~!b[", "[e~[",
]  # fmt: skip


@needs_trl
def test_a_judge_gets_no_control_token_of_any_family():
    names = {name for file in TEMPLATES for name in NAMES.findall(file.read_text(encoding="utf-8"))}
    markup = re.compile(r"</?[A-Za-z][\w:=.-]*>|\[[a-z]+\]")  # <tools>, what an example of a call is written in, code
    control = {*(name for name in names if not markup.fullmatch(name)), *OTHER_FAMILIES}
    assert len(control) > 60
    assert not [name for name in control if harmless(f"a{name}b", "plain") == f"a{name}b"]
    for text in ("if a <b> | c </b> [A] x < s > [TODO]", "<son> <think> <tool_call> |> <|", "a[i] ] ~ b]"):
        assert harmless(text, "plain") == text


@needs_trl
def test_there_are_many():
    assert len(TEMPLATES) >= 70


@needs_trl
def test_the_table_of_the_docs_is_true():
    page = (Path(__file__).parents[2] / "docs" / "templates.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and "| learned" not in line]
    assert rows == [*map(row, TEMPLATES)]


def row(template):
    """A line of the table."""
    tokenizer = tokenizer_of(template)
    told: list[str] = []
    [examples] = encode_dialogues(tokenizer, [dialogue(3, template.stem not in NO_SYSTEM)], [0], note=told.append)
    said = tokenizer.decode(next(learned_spans(examples))[1])
    end = tokenizer.convert_ids_to_tokens([*turn_end(tokenizer)])
    beyond = any("other text as the assistant's" in line for line in told)
    notes = [
        *(["content in parts"] if TemplateForm(tokenizer).in_parts else []),
        *(["no system message"] if template.stem in NO_SYSTEM else []),
        *(["an answer without a thought leaves `<think>` open"] if any("as it stands" in t for t in told) else []),
        *(["`{% generation %}` goes beyond the end" if beyond else "`{% generation %}`"]
          if GENERATION.search(tokenizer.chat_template) else []),
    ]  # fmt: skip
    cells = [template.stem, str(len(examples)), f"`{said}`", *(f"`{token}`" for token in end or ["(end-of-text)"])]
    return (
        "| " + " | ".join(cell.replace("\n", "\\n").replace("|", "\\|") for cell in [*cells, "; ".join(notes)]) + " |"
    )


if __name__ == "__main__":
    print("| template | examples from three turns | learned in the first | end of the turn | notes |")
    print("|---|---|---|---|---|")
    print("\n".join(map(row, TEMPLATES)))
