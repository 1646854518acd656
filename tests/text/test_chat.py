import pytest
from tokenizers.processors import TemplateProcessing

from lit_rlhf.errors import UserError
from lit_rlhf.stages import WorldEvaluateDataModule
from lit_rlhf.text import (
    Transcript,
    encode_dialogues,
    encode_prompts,
    encode_responses,
    ensure_chat_template,
    is_base,
)
from lit_rlhf.text.chat import BASE_TEMPLATE, ROLE_TEMPLATE, TRANSCRIPT_TEMPLATE
from lit_rlhf.text.tokenizer import load_tokenizer

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
    (encoded,) = encode_dialogues(tokenizer, [SINGLE], [1])
    assert encoded.tokens == [user_id, *question, assistant_id, *answer, eos]
    assert encoded.mask == [False] * (len(question) + 2) + [True] * (len(answer) + 1)  # end-of-text is learned


def test_every_answer_of_several_turns_is_learned(tokenizer):
    tokenizer.chat_template = ROLE_TEMPLATE
    (encoded,) = encode_dialogues(tokenizer, [SEVERAL], [0])
    assert learned(tokenizer, encoded) == [" the cat<|endoftext|>", "  42 <|endoftext|>", " 👍🏽<|endoftext|>"]
    assert tokenizer.decode(encoded.tokens) == (
        "<|system|> You are the cat.<|user|> Who are you?<|assistant|> the cat<|endoftext|><|user|> What is it?"
        "<|assistant|>  42 <|endoftext|><|user|> ?!<|assistant|> 👍🏽<|endoftext|>"
    )


@pytest.mark.parametrize(("context", "expected"), [(0, 3), (2, 3), (3, 2), (5, 1), (6, 1)])
def test_only_answers_from_the_context_on_are_learned(tokenizer, context, expected):
    tokenizer.chat_template = ROLE_TEMPLATE
    whole, part = encode_dialogues(tokenizer, [SEVERAL, SEVERAL], [0, context])
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
    for prompt, response, item in zip(before, after, encoded):
        assert item.tokens == prompt + response
        assert item.mask == [False] * len(prompt) + [True] * len(response)
        assert response[-1] == tokenizer.eos_token_id and response.count(tokenizer.eos_token_id) == 1


def test_what_a_template_writes_after_end_of_text_belongs_to_the_next_turn(tokenizer):
    tokenizer.chat_template = CHATML
    (encoded,) = encode_dialogues(tokenizer, [SEVERAL[1:]], [0])
    assert learned(tokenizer, encoded) == ["the cat<|endoftext|>", " 42 <|endoftext|>", "👍🏽<|endoftext|>"]
    whole = tokenizer.apply_chat_template(SEVERAL[1:], tokenize=False)
    assert tokenizer.decode(encoded.tokens) == whole.removesuffix("\n")


def test_a_template_without_end_of_text_gets_one(tokenizer):
    tokenizer.chat_template = TURNS.replace("CONTENT", "m['content']")
    (encoded,) = encode_dialogues(tokenizer, [SINGLE * 2], [0])
    assert learned(tokenizer, encoded) == ["It is  42,\nI am!<|endoftext|>"] * 2


@pytest.mark.parametrize(
    ("content", "dialogue"),
    [
        ("(m['content'] if loop.last else '…')", SINGLE),  # the question is hidden once it is answered
        ("m['content'].split('</think>')[-1 if not loop.last else 0]", [user("q"), assistant("x</think>y")] * 2),
    ],
    ids=["prompt", "earlier answer"],
)
def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer, content, dialogue):
    tokenizer.chat_template = TURNS.replace("CONTENT", content)
    with pytest.raises(UserError, match="chat template rewrites earlier turns"):
        encode_dialogues(tokenizer, [dialogue], [0])


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
    (encoded,) = encode_dialogues(tokenizer, [SEVERAL[:5]], [0])
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
    tokenizer.chat_template = "{% for m in messages %}{{ raise_exception('roles must alternate') }}{% endfor %}"
    with pytest.raises(UserError, match="chat template refuses a dialogue of the data: roles must alternate"):
        encode_prompts(tokenizer, [[user("Hi"), user("Hi")]])


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
    world = WorldEvaluateDataModule.transcript
    assert world.template == Transcript(human="Anna asked:", assistant="Ben said:", between="\n").template
    assert world.answer(" It is.\nEmma asked: Why?") == "It is."
    said = " I am.\n\nand more\n\nHuman: Why?\n\nAssistant: So."
    assert Transcript().answer(said) == "I am.\n\nand more" and Transcript().answer("Human: Why?") == ""
    assert Transcript().answer(" I am") == "I am"
