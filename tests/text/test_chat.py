import copy
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lit_rlhf.errors import UserError
from lit_rlhf.text import (
    Transcript,
    encode_dialogues,
    encode_prompts,
    encode_responses,
    ensure_chat_template,
    is_base,
    transcript_for,
)
from lit_rlhf.text.chat import BASE_TEMPLATE, ROLE_TEMPLATE, TRANSCRIPT_TEMPLATE, WORLD_MARK, behind_start, turn_end
from lit_rlhf.text.special_tokens import text_start
from lit_rlhf.text.tokenizer import load_tokenizer, train_characters
from lit_rlhf.text.transcripts import HUMAN_TRANSCRIPT, WORLD_TRANSCRIPT

ROOT = Path(__file__).parents[2]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TURNS = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + CONTENT }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SINGLE = [user("What is 12?"), assistant("It is  42,\nI am!")]
SEVERAL = [
    {"role": "system", "content": "You are the cat."},
    user("Who are you?"),
    assistant("the cat"),
    user("What is it?"),
    assistant(" 42 "),
    user("?!"),
    assistant("👍🏽"),
]


def learned(tokenizer, encoded):
    """The spans of learned tokens, as text."""
    spans = [""]
    for token, mask in zip(encoded.tokens, encoded.mask, strict=True):
        if mask:
            spans[-1] += f"{token} "
        elif spans[-1]:
            spans.append("")
    return [tokenizer.decode([int(i) for i in span.split()]) for span in spans if span]


def test_one_turn_by_hand(tokenizer):
    tokenizer.chat_template = ROLE_TEMPLATE
    eos, user_id, assistant_id = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<|assistant|>"])
    question, answer = (tokenizer(" " + m["content"])["input_ids"] for m in SINGLE)
    [[encoded]] = encode_dialogues(tokenizer, [SINGLE], [1])
    assert encoded.tokens == [user_id, *question, assistant_id, *answer, eos]
    assert encoded.mask == [False] * (len(question) + 2) + [True] * (len(answer) + 1)  # end-of-text is learned


def test_every_answer_of_several_turns_is_learned(tokenizer):
    tokenizer.chat_template = ROLE_TEMPLATE
    [[encoded]] = encode_dialogues(tokenizer, [SEVERAL], [0])
    assert learned(tokenizer, encoded) == [" the cat<|endoftext|>", "  42 <|endoftext|>", " 👍🏽<|endoftext|>"]
    assert tokenizer.decode(encoded.tokens) == (
        "<|system|> You are the cat.<|user|> Who are you?<|assistant|> the cat<|endoftext|><|user|> What is it?"
        "<|assistant|>  42 <|endoftext|><|user|> ?!<|assistant|> 👍🏽<|endoftext|>"
    )


@pytest.mark.parametrize(("context", "expected"), [(0, 3), (2, 3), (3, 2), (5, 1), (6, 1)])
def test_only_answers_from_the_context_on_are_learned(tokenizer, context, expected):
    tokenizer.chat_template = ROLE_TEMPLATE
    [[whole], [part]] = encode_dialogues(tokenizer, [SEVERAL, SEVERAL], [0, context])
    assert part.tokens == whole.tokens
    assert learned(tokenizer, part) == learned(tokenizer, whole)[-expected:]


@pytest.mark.parametrize("template", [ROLE_TEMPLATE, TRANSCRIPT_TEMPLATE, BASE_TEMPLATE, CHATML])
def test_training_sees_what_generation_will_see(tokenizer, template):
    tokenizer.chat_template = template
    prompts = [SINGLE[:1], SEVERAL[:2], SEVERAL[:4], SEVERAL[:6]]
    answers = [SINGLE[1]["content"], *(m["content"] for m in SEVERAL[2::2])]
    before, after = encode_prompts(tokenizer, prompts), encode_responses(tokenizer, prompts, answers)
    dialogues = [[*prompt, assistant(answer)] for prompt, answer in zip(prompts, answers)]
    encoded = encode_dialogues(tokenizer, dialogues, [len(prompt) for prompt in prompts])
    for prompt, response, [item] in zip(before, after, encoded):
        assert item.tokens == prompt + response
        assert item.mask == [False] * len(prompt) + [True] * len(response)
        assert response[-1] == tokenizer.eos_token_id and response.count(tokenizer.eos_token_id) == 1


def test_what_a_template_writes_after_end_of_text_belongs_to_the_next_turn(tokenizer):
    tokenizer.chat_template = CHATML
    [[encoded]] = encode_dialogues(tokenizer, [SEVERAL[1:]], [0])
    assert learned(tokenizer, encoded) == ["the cat<|endoftext|>", " 42 <|endoftext|>", "👍🏽<|endoftext|>"]
    whole = tokenizer.apply_chat_template(SEVERAL[1:], tokenize=False)
    assert tokenizer.decode(encoded.tokens) == whole.removesuffix("\n")


def test_a_template_without_an_end_gets_end_of_text_and_earlier_turns_stay_as_it_writes_them(tokenizer):
    tokenizer.chat_template = TURNS.replace("CONTENT", "m['content']")
    [[first, second]] = encode_dialogues(tokenizer, [SINGLE * 2], [0])
    assert learned(tokenizer, first) == learned(tokenizer, second) == ["It is  42,\nI am!<|endoftext|>"]
    asked = "[user]What is 12?[assistant]"
    assert tokenizer.decode(second.tokens) == f"{asked}It is  42,\nI am!{asked}It is  42,\nI am!<|endoftext|>"


DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\\nBe kind.<|im_end|>\\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\\n{% endif %}"
)
HASHES = (
    "{% for m in messages %}{{ '### ' + m['role'].capitalize() + ':\\n' + m['content'] + '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\\n{% endif %}"
)


@pytest.mark.parametrize("own_tokens", [False, True], ids=["plain", "special"])
@pytest.mark.parametrize(
    "template",
    [ROLE_TEMPLATE, TRANSCRIPT_TEMPLATE, CHATML, DEFAULT_SYSTEM, HASHES, TURNS.replace("CONTENT", "m['content']")],
)
def test_a_turn_that_is_opened_unasked_is_not_learned(tokenizer, template, own_tokens):
    if own_tokens:  # none of them is the tokenizer's end-of-text
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    opens = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    opens.chat_template = template.replace("{% if add_generation_prompt %}", "{% if true %}")
    for messages in (SINGLE, SEVERAL, SEVERAL[1:]):
        written = [encode_dialogues(t, [messages], [0]) for t in (opens, tokenizer)]
        assert written[0] == written[1]
        assert encode_prompts(opens, [messages[:-1]]) == encode_prompts(tokenizer, [messages[:-1]])
    answers = [encode_responses(t, [SINGLE[:1]], ["It is <|im_start|>assistant\n"]) for t in (opens, tokenizer)]
    assert answers[0] == answers[1]
    assert turn_end(opens) == turn_end(tokenizer)


THINKING = [user("q"), assistant("<think>x</think>y"), user("q"), assistant("<think>x</think>y")]


@pytest.mark.parametrize(
    ("content", "dialogue", "prompts"),
    [
        # The question is hidden once it is answered.
        ("(m['content'] if loop.last else '…')", SINGLE, ["[user]What is 12?[assistant]"]),
        # What was thought is left out of earlier turns.
        (
            "(m['content'] if loop.last else m['content'].split('</think>')[-1])",
            THINKING,
            ["[user]q[assistant]", "[user]q[assistant]y[user]q[assistant]"],
        ),
    ],
    ids=["prompt", "earlier answer"],
)  # fmt: skip
def test_a_template_that_rewrites_earlier_turns_is_learned_turn_by_turn(tokenizer, content, dialogue, prompts):
    tokenizer.chat_template = TURNS.replace("CONTENT", content)
    [examples] = encode_dialogues(tokenizer, [dialogue], [0])
    asked = [tokenizer.decode([t for t, m in zip(e.tokens, e.mask) if not m]) for e in examples]
    assert asked == prompts
    for example in examples:
        assert learned(tokenizer, example) == [dialogue[1]["content"] + "<|endoftext|>"]


def test_an_empty_answer_is_end_of_text(tokenizer):
    tokenizer.chat_template = CHATML
    assert encode_responses(tokenizer, [SINGLE[:1]], [""]) == [[tokenizer.eos_token_id]]


def test_nothing_to_encode(tokenizer):
    tokenizer.chat_template = ROLE_TEMPLATE
    assert (
        encode_prompts(tokenizer, [])
        == encode_responses(tokenizer, [], [])
        == encode_dialogues(tokenizer, [], [])
        == []
    )


def test_a_tokenizer_with_roles_gets_the_role_template(tokenizer):
    for template in (None, BASE_TEMPLATE):
        tokenizer.chat_template = template
        ensure_chat_template(tokenizer)
        assert tokenizer.chat_template == ROLE_TEMPLATE


def test_a_template_of_its_own_is_kept(tokenizer):
    tokenizer.chat_template = CHATML
    ensure_chat_template(tokenizer)
    assert tokenizer.chat_template == CHATML


def test_a_tokenizer_without_roles_gets_the_transcript_template(test_data):
    tokenizer = load_tokenizer(test_data / "gpt2-tokenizer")
    size = len(tokenizer)
    ensure_chat_template(tokenizer)
    assert tokenizer.chat_template == TRANSCRIPT_TEMPLATE and len(tokenizer) == size
    [[encoded]] = encode_dialogues(tokenizer, [SEVERAL[:5]], [0])
    assert tokenizer.decode(encoded.tokens) == (
        "\n\nSystem: You are the cat.\n\nHuman: Who are you?\n\nAssistant: the cat<|endoftext|>"
        "\n\nHuman: What is it?\n\nAssistant:  42 <|endoftext|>"
    )
    assert learned(tokenizer, encoded) == [" the cat<|endoftext|>", "  42 <|endoftext|>"]


def test_no_special_tokens_but_those_of_the_template(tokenizer):
    tokenizer.chat_template = ROLE_TEMPLATE
    before = encode_prompts(tokenizer, [SINGLE[:1]]), encode_responses(tokenizer, [SINGLE[:1]], ["42"])
    bos = ("<|endoftext|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    assert tokenizer("42")["input_ids"][0] == bos[1]  # as the tokenizers of some checkpoints do
    assert before == (encode_prompts(tokenizer, [SINGLE[:1]]), encode_responses(tokenizer, [SINGLE[:1]], ["42"]))


def test_a_template_that_refuses_a_dialogue_says_so_in_one_line(tokenizer):
    turns = "{% for m in messages %}{% if loop.index0 % 2 and m.role != 'assistant' %}"
    tokenizer.chat_template = (
        turns + "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(UserError, match="chat template refuses the dialogue: roles must alternate"):
        encode_prompts(tokenizer, [[user("Hi"), user("Hi")]])
    refused = {}
    prompts = [[user("Hi")], [user("Hi"), user("Hi")], [user("Ho")]]
    found = encode_prompts(tokenizer, prompts, refuse=refused.__setitem__)
    assert [*map(tokenizer.decode, found)] == ["Hi", "", "Ho"]
    assert refused == {1: "this tokenizer's chat template refuses the dialogue: roles must alternate"}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ bos_token }}", "cannot write a question and an answer: it leaves out what is said"),
        ("{% for m in messages %}{{ m.content.no.such }}{% endfor %}", "question and an answer: .* has no attribute"),
        ("{% for m in messages %}{% if %}", "question and an answer: .*refuses the dialogue: Expected an expression"),
    ],
)
def test_a_template_that_cannot_write_a_dialogue_is_refused(tokenizer, template, message):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=message) as refused:
        encode_prompts(tokenizer, [[user("Hi")]])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("dialogue", "reason"),
    [
        ([assistant("Hi")], "nothing stands before the assistant's turn"),
        ([{"role": "system", "content": "Be."}, assistant("Hi")], "only a system message stands before the assistant"),
        ([user(" "), assistant("Hi")], "a turn of the user is empty"),
        ([user("Hi"), assistant("\n")], "a turn of the assistant is empty"),
    ],
)
def test_dialogues_that_are_none(tokenizer, dialogue, reason):
    tokenizer.chat_template = CHATML
    with pytest.raises(UserError, match=reason):
        encode_dialogues(tokenizer, [dialogue], [0])


def test_two_turns_of_the_assistant_in_a_row_are_both_learned(tokenizer):
    tokenizer.chat_template = CHATML
    [[encoded]] = encode_dialogues(tokenizer, [[user("q"), assistant("a"), assistant("b")]], [0])
    assert learned(tokenizer, encoded) == ["a<|endoftext|>", "b<|endoftext|>"]


def test_what_a_template_leaves_out_is_refused(tokenizer):
    tokenizer.chat_template = CHATML.replace("for m in messages", "for m in messages if m['role'] != 'system'")
    with pytest.raises(UserError, match=r"leaves out 'content' of a message of the system .'You are the cat.'"):
        encode_prompts(tokenizer, [SEVERAL[:2]])
    tokenizer.chat_template = CHATML.replace("+ m['content']", "+ m['content'].split('#')[0]")
    with pytest.raises(UserError, match=r"leaves out 'content' of a message of the assistant .'one # two'"):
        encode_responses(tokenizer, [SINGLE[:1]], ["one # two"])
    thought = {**assistant("a"), "reasoning_content": "hm"}
    with pytest.raises(UserError, match=r"leaves out 'reasoning_content'"):
        encode_dialogues(tokenizer, [[user("q"), thought]], [0])


PARTS = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' }}{% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("template", [PARTS, CHATML], ids=["parts", "text"])
def test_content_is_written_as_the_template_wants_it(tokenizer, template):
    tokenizer.chat_template = template
    as_parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in SEVERAL]
    one, other = encode_dialogues(tokenizer, [SEVERAL, as_parts], [0, 0])
    assert one == other
    assert learned(tokenizer, one[0]) == ["the cat<|endoftext|>", " 42 <|endoftext|>", "👍🏽<|endoftext|>"]
    given = as_parts if template == PARTS else SEVERAL
    assert encode_prompts(tokenizer, [SEVERAL[:4]]) == [
        tokenizer.apply_chat_template(given[:4], add_generation_prompt=True)["input_ids"]
    ]
    image = [{"role": "user", "content": [{"type": "image", "url": "cat.png"}]}]
    if template == CHATML:
        with pytest.raises(UserError, match="holds a part that is no text"):
            encode_prompts(tokenizer, [image])


PARTS_OF = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' }}{% if m['role'] in ROLES %}{% for part in m['content'] %}"
    "{% if part is mapping %}{{ part['text'] }}{% endif %}{% endfor %}{% else %}{{ m['content'] + '' }}{% endif %}"
    "{% for call in m.tool_calls %}{{ call.function.name }}{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize(
    "roles", [["user"], ["user", "system"], ["user", "tool"], ["assistant"], ["system"], ["user", "assistant", "tool"]]
)
def test_some_roles_have_content_in_parts(tokenizer, roles, tmp_path):
    call = {"type": "function", "function": {"name": "cat", "arguments": {}}}
    turns = [
        *SEVERAL[:3], user("And now?"), {**assistant("I call."), "tool_calls": [call]},
        {"role": "tool", "content": "Here!"}, assistant("It is here."),
    ]  # fmt: skip
    tokenizer.chat_template = PARTS_OF.replace("ROLES", str(roles))
    tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    [[encoded]] = encode_dialogues(tokenizer, [turns], [0])
    answers = ["the cat<|endoftext|>", "I call.cat<|endoftext|>", "It is here.<|endoftext|>"]
    assert learned(tokenizer, encoded) == answers
    assert tokenizer.decode(encoded.tokens) == (
        f"[system]You are the cat.<|endoftext|>[user]Who are you?<|endoftext|>[assistant]{answers[0]}"
        f"[user]And now?<|endoftext|>[assistant]{answers[1]}[tool]Here!<|endoftext|>[assistant]{answers[2]}"
    )


def test_an_answer_may_begin_with_what_the_prompt_has_opened(tokenizer):
    tokenizer.chat_template = CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif")
    answer = "<think>\nIt is.\n</think>\n42"
    [prompt], [response] = encode_prompts(tokenizer, [SINGLE[:1]]), encode_responses(tokenizer, [SINGLE[:1]], [answer])
    assert tokenizer.decode(prompt).endswith("assistant\n<think>\n")
    assert tokenizer.decode(response) == "It is.\n</think>\n42<|endoftext|>"
    [[encoded]] = encode_dialogues(tokenizer, [[SINGLE[0], assistant(answer)]], [0])
    assert encoded.tokens == prompt + response


def test_a_tag_is_compared_whole(tokenizer):
    thought = "{{ '<think>' if '</think>' in m['content'] else '</think>' }}"
    tokenizer.chat_template = (
        f"{{% for m in messages %}}[{{{{ m['role'] }}}}]{{% if m['role'] == 'assistant' %}}{thought}{{% endif %}}"
        "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]<think>{% endif %}"
    )
    said = encode_responses(tokenizer, [SINGLE[:1]] * 2, ["42", "why</think>42"])
    assert [tokenizer.decode(response) for response in said] == [
        "</think>42<|endoftext|>",
        "why</think>42<|endoftext|>",
    ]


GENERATION = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}[assistant]{% generation %}SAID{% endgeneration %}"
    "{% else %}{{ '[user]' + m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_template_says_itself_what_is_learned(tokenizer):
    two = [user("q"), assistant("one"), user("q"), assistant("two")]
    tokenizer.chat_template = GENERATION.replace("SAID", "{{ m['content'] + eos_token }}")
    said = []
    [[encoded]] = encode_dialogues(tokenizer, [two], [0], note=said.append)
    assert not said
    assert learned(tokenizer, encoded) == ["one<|endoftext|>", "two<|endoftext|>"]
    for marked, expected in (
        ("{{ m['content'] }}{{ eos_token }} ", ["one<|endoftext|> ", "two<|endoftext|> "]),  # more
        ("{{ m['content'] }}{% endgeneration %}{{ eos_token }}{% generation %}", ["one", "two"]),  # less
    ):
        tokenizer.chat_template, said = GENERATION.replace("SAID", marked), []
        [[encoded], _] = encode_dialogues(tokenizer, [two, two], [0, 0], note=said.append)
        assert learned(tokenizer, encoded) == expected
        [line] = said
        assert "marks other text as the assistant's" in line and line.endswith("what it marks is learned")


def test_what_a_tokenizer_cannot_write_is_said_once():
    tokenizer, said = train_characters(["user assistant: yes no"]), []
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    one, two = ([user("yes"), assistant(f"no{text}")] for text in ("😀", "🎉"))
    [[first], [other]] = encode_dialogues(tokenizer, [one, two], [0, 0], note=said.append)
    assert first.tokens == other.tokens
    assert said == [
        "the tokenizer cannot write some characters of the texts: '<|unk|>' stands for each, and texts that differ in "
        "them alone are the same to the model"
    ]
    encode_responses(tokenizer, [one[:1]], ["no"], note=said.append)
    encode_prompts(tokenizer, [one[:1]], note=said.append)
    assert len(said) == 1
    encode_responses(tokenizer, [one[:1]], ["NO"], note=said.append)
    encode_prompts(tokenizer, [[user("Yes")]], note=said.append)
    assert len(said) == 3


def test_turns_of_weight_0_are_shown_and_not_learned(tokenizer):
    tokenizer.chat_template = CHATML
    one, two = {**assistant("one"), "weight": 0}, {**assistant("two"), "weight": 1}
    [[encoded], [other]] = encode_dialogues(
        tokenizer, [[user("p"), one, user("q"), two], [user("p"), two, user("q"), one]], [0, 0]
    )
    assert learned(tokenizer, encoded) == ["two<|endoftext|>"] == learned(tokenizer, other)
    [[whole]] = encode_dialogues(tokenizer, [[user("p"), assistant("one"), user("q"), assistant("two")]], [0])
    assert encoded.tokens == whole.tokens
    assert tokenizer.decode(other.tokens).endswith("two<|endoftext|>")  # nothing behind it is learned


def test_tools_are_written_and_calls_are_learned(tokenizer):
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{% for m in messages %}"
        "{{ '[' + m.role + ']' + (m.content or '') }}{% for call in m.tool_calls or [] %}{{ call.function | tojson }}"
        "{% endfor %}{% if m.role == 'assistant' %}{{ eos_token + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    call = {"type": "function", "function": {"name": "multiply", "arguments": {"a": 2}}}
    calls = {"role": "assistant", "content": None, "tool_calls": [call]}
    turns = [user("2?"), calls, {"role": "tool", "content": "4"}, assistant("It is 4.")]
    [[encoded]] = encode_dialogues(tokenizer, [turns], [0], [[call]])
    called = '{"name": "multiply", "arguments": {"a": 2}}<|endoftext|>'
    assert learned(tokenizer, encoded) == [called, "It is 4.<|endoftext|>"]
    whole = f"multiply [user]2?[assistant]{called}\n[tool]4[assistant]It is 4.<|endoftext|>"
    assert tokenizer.decode(encoded.tokens) == whole
    [prompt], [response] = (
        f(tokenizer, [[user("2?")]], *more, [[call]]) for f, more in ((encode_prompts, []), (encode_responses, [["4"]]))
    )
    assert tokenizer.decode(prompt + response) == "multiply [user]2?[assistant]4<|endoftext|>"
    tokenizer.chat_template, said = CHATML, []
    encode_prompts(tokenizer, [[user("2?")], [user("3?")]], [[call], [call]], note=said.append)
    assert said == ["this tokenizer's chat template leaves out tools that the records describe: no model sees them"]
    with pytest.raises(UserError, match=r"leaves out 'tool_calls.0.'"):
        encode_dialogues(tokenizer, [[user("2?"), {**calls, "content": ""}]], [0])


def two_ends(tokenizer):
    """As SmolLM2, Qwen and others: <|im_end|> ends a turn, <|endoftext|> a text."""
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML.replace("eos_token", "'<|im_end|>'")
    return tokenizer


def test_a_turn_ends_as_the_template_ends_it_and_nothing_is_added(tokenizer):
    two_ends(tokenizer)
    assert turn_end(tokenizer) == {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    [[encoded]] = encode_dialogues(tokenizer, [SEVERAL], [0])
    assert learned(tokenizer, encoded) == ["the cat<|im_end|>", " 42 <|im_end|>", "👍🏽<|im_end|>"]
    assert tokenizer.eos_token_id not in encoded.tokens
    whole = tokenizer.apply_chat_template(SEVERAL)["input_ids"]
    assert encoded.tokens == whole[: len(encoded.tokens)]
    assert encode_responses(tokenizer, [SINGLE[:1]], ["a"])[0][-1:] == [*turn_end(tokenizer)]


def test_the_end_of_a_turn(tokenizer):
    for template, end in (
        (ROLE_TEMPLATE, "<|endoftext|>"),
        (BASE_TEMPLATE, None),
        (TURNS.replace("CONTENT", "m['content']"), None),
        (CHATML.replace("eos_token", "'<|pad|><|user|>'"), "<|user|>"),  # a run of them: the last
        (
            CHATML.replace("eos_token", "eos_token + '<|user|>'"),
            "<|endoftext|>",
        ),  # the tokenizer's
        (CHATML.replace("eos_token", "'<|user|>\n' + eos_token"), "<|user|>"),  # Phi-3: the first
    ):
        tokenizer.chat_template = template
        assert turn_end(tokenizer) == ({tokenizer.convert_tokens_to_ids(end)} if end else set())
    tokenizer.chat_template = None
    assert turn_end(tokenizer) == set()


def test_a_text_begins_as_the_tokenizer_begins_one(tokenizer):
    for own in (None, BASE_TEMPLATE):
        assert text_start(tokenizer) == []
        tokenizer.chat_template = own
        ensure_chat_template(tokenizer)
        assert tokenizer.chat_template == ROLE_TEMPLATE
    [bare] = encode_prompts(tokenizer, [SINGLE[:1]])
    bos = tokenizer.convert_tokens_to_ids("<|system|>")
    begun = TemplateProcessing(single="<|system|> $A <|pad|>", special_tokens=[("<|system|>", bos), ("<|pad|>", 1)])
    tokenizer.backend_tokenizer.post_processor = begun
    assert text_start(tokenizer) == [bos]  # what stands in front, and nothing of what stands behind
    tokenizer.chat_template = None
    ensure_chat_template(tokenizer)
    assert encode_prompts(tokenizer, [SINGLE[:1]]) == [[bos, *bare]]
    assert tokenizer.apply_chat_template(SINGLE[:1], add_generation_prompt=True)["input_ids"] == [bos, *bare]
    shown = Transcript().prompting(tokenizer)
    assert encode_prompts(shown, [SINGLE[:1]])[0][:2] == [bos, *shown("Human")["input_ids"][1:-1]][:2]
    tokenizer.chat_template = behind_start(tokenizer, BASE_TEMPLATE)
    assert is_base(tokenizer)
    tokenizer.chat_template = CHATML  # a template of its own says itself how a text begins
    assert bos not in encode_prompts(tokenizer, [SINGLE[:1]])[0]


def sentencepiece():
    """Llama 2's kind: a space is put before a text, wherever it stands."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", "▁", *"abcdefgh:?.<>/s", "<0x0A>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def test_a_response_gets_no_space_that_only_a_text_of_its_own_would(tokenizer):
    tokenizer = sentencepiece()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content + ('</s>' if m.role == 'assistant' else ': ') }}{% endfor %}"
    )
    [response] = encode_responses(tokenizer, [[user("abc?")]], ["def"])
    assert tokenizer.convert_ids_to_tokens(response) == ["d", "e", "f", "</s>"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("def")["input_ids"]) == ["▁", "d", "e", "f"]


def test_a_base_model_is_shown_a_transcript(tokenizer):
    tokenizer.chat_template = BASE_TEMPLATE
    examples = [{"role": "user", "content": 'Say "{{ 7 * 7 }}" {% if %}\n🐈'}, {"role": "assistant", "content": "No."}]
    transcript = Transcript("A talk.", examples)
    prompting = transcript.prompting(tokenizer)
    asked = [{"role": "user", "content": "Hi {{ eos_token }}"}]
    shown = 'A talk.\n\nHuman: Say "{{ 7 * 7 }}" {% if %}\n🐈\n\nAssistant: No.\n\n'
    shown += "Human: Hi {{ eos_token }}\n\nAssistant:"
    assert prompting.decode(encode_prompts(prompting, [asked])[0]) == shown
    more = [*asked, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Who?"}]
    after = " Hello.\n\nHuman: Who?\n\nAssistant:"
    assert prompting.decode(encode_prompts(prompting, [more])[0]) == shown + after
    system = [{"role": "system", "content": "Be brief."}, *asked]
    assert prompting.decode(encode_prompts(prompting, [system])[0]) == shown.replace("A talk.", "Be brief.")
    assert transcript.stops == ("\nHuman:", "\nAssistant:")
    assert is_base(tokenizer) and not is_base(prompting)  # a copy: the tokenizer is as it was


def test_a_transcript_without_opening_and_in_other_words(tokenizer):
    prompting = Transcript(human="Anna asked:", assistant="Ben said:", between="\n").prompting(tokenizer)
    [tokens] = encode_prompts(prompting, [[{"role": "user", "content": "Hi"}]])
    assert prompting.decode(tokens) == "Anna asked: Hi\nBen said:"
    world = WORLD_TRANSCRIPT
    assert world.answer(" It is.\nEmma asked: Why?") == "It is."
    said = " I am.\n\nand more\n\nHuman: Why?\n\nAssistant: So."
    assert Transcript().answer(said) == "I am.\n\nand more" and Transcript().answer("Human: Why?") == ""
    assert Transcript().answer(" I am") == "I am"


def test_a_base_model_goes_on_with_a_transcript_in_the_words_that_it_has_read(tokenizer):
    own = copy.deepcopy(tokenizer)
    for template, transcript in (
        (None, HUMAN_TRANSCRIPT), (BASE_TEMPLATE, HUMAN_TRANSCRIPT), (WORLD_MARK + BASE_TEMPLATE, WORLD_TRANSCRIPT),
    ):  # fmt: skip
        own.chat_template = template
        assert is_base(own) and transcript_for(own) is transcript
    own.chat_template = WORLD_MARK + BASE_TEMPLATE
    asked = [{"role": "user", "content": "Hi"}]
    assert own.decode(encode_prompts(own, [asked])[0]) == "Hi\n"  # a mark is no text
    ensure_chat_template(own)
    assert not is_base(own)


@pytest.mark.parametrize(("name", "transcript"), [("human", HUMAN_TRANSCRIPT), ("world", WORLD_TRANSCRIPT)])
def test_the_settings_are_the_constants(name, transcript):
    written = yaml.safe_load((ROOT / f"conf/chat/transcript/{name}.yaml").read_text(encoding="utf-8"))
    del written["_target_"]
    assert Transcript(**{**written, "examples": tuple(written["examples"])}) == transcript


@pytest.mark.parametrize("form", ["%d %B %Y", "%H:%M:%S", "%f"])
def test_a_template_that_writes_the_time(tokenizer, form):
    tokenizer.chat_template = f"{{{{ strftime_now({form!r}) + '\\n' }}}}" + ROLE_TEMPLATE
    if form == "%f":  # then nothing tells the prompt from the answer
        with pytest.raises(UserError, match="writes the same dialogue otherwise each time"):
            encode_dialogues(tokenizer, [SINGLE] * 3, [0] * 3)
        return
    for [example] in encode_dialogues(tokenizer, [SINGLE] * 9, [0] * 9):
        learned = tokenizer.decode([t for t, m in zip(example.tokens, example.mask) if m])
        assert learned == " It is  42,\nI am!<|endoftext|>"


def test_a_template_that_cuts_what_is_said_is_refused_for_that(tokenizer):
    tokenizer.chat_template = ROLE_TEMPLATE.replace("message['content']", "(message['content'] + '')[:4]")
    with pytest.raises(UserError, match="it leaves out what is said"):
        turn_end(tokenizer)
