import json
import random
import sys
from dataclasses import replace

import pytest

from lit_rlhf.apps.chat import Chat, Conversation, load_assistant
from lit_rlhf.errors import UserError
from lit_rlhf.models import load_policy_and_tokenizer
from lit_rlhf.rollouts import FastEngine, Sampling, sample
from lit_rlhf.text import encode_prompts
from lit_rlhf.text.records import load_records, parse_ranking
from lit_rlhf.training import seeded


def said(growing):
    """The answers when they are complete."""
    for answers in growing:  # noqa: B007
        pass
    return answers


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def user(text):
    return {"role": "user", "content": text}


def test_an_answer_is_the_models_own_turn_after_turn(converse, models):
    talk = converse("ppo", seed=5, system="You are the cat.")
    [first] = said(talk.ask("Who are you?"))
    [second] = said(talk.ask("And then?"))
    policy, tokenizer = load_policy_and_tokenizer(models["ppo"])
    prompt = [{"role": "system", "content": "You are the cat."}, user("Who are you?")]
    texts = []
    for turn, given in ((1, first), (2, second)):
        tokens = encode_prompts(tokenizer, [prompt])
        drawn = sample(FastEngine(), policy.eval(), tokenizer, tokens, Sampling(8), seeded(5, turn, 0))
        texts += drawn.texts(tokenizer)
        assert given.prompt == prompt
        prompt = [*prompt, {"role": "assistant", "content": texts[-1]}, user("And then?")]
    assert [first.text, second.text] == texts
    assert [m["content"] for m in talk.messages] == ["Who are you?", texts[0], "And then?", texts[1]]


def test_the_same_seed_gives_the_same_conversation_and_regenerating_another_answer(converse):
    talks = [converse("sft", seed=3) for _ in range(2)]
    assert said(talks[0].ask("Hi"))[0].text == said(talks[1].ask("Hi"))[0].text
    first = talks[0].messages[-1]["content"]
    again = said(talks[0].regenerate())[0].text
    assert again != first
    assert [m["content"] for m in talks[0].messages] == ["Hi", again]
    talks[0].clear()
    assert said(talks[0].ask("Hi"))[0].text == first


def test_without_a_place_for_judgements_one_talks_all_the_same(models):
    conversation = Conversation([load_assistant("sft", models["sft"])], sampling=Sampling(max_new_tokens=8))
    *_, [answer] = conversation.ask("Who are you?")
    assert conversation.messages[-1] == {"role": "assistant", "content": answer.text}
    answer.text = "I am the cat."
    with pytest.raises(UserError, match="keeps no judgements"):
        conversation.rate(1)


def test_thumbs_are_feedback_records_at_once_and_can_be_changed(converse, judgements):
    talk = converse("ppo")
    said(talk.ask("Who are you? 🐈 \u05e9\u05dc\u05d5\u05dd"))
    text = talk.messages[-1]["content"]
    talk.rate(1)
    [record] = rows(judgements.feedback_file)
    assert record["prompt"] == [user("Who are you? 🐈 \u05e9\u05dc\u05d5\u05dd")] and record["response"] == text
    assert (record["rating"], record["annotator"], record["model"], record["round"]) == (1, "anna", "ppo", 2)
    assert record["sampling"]["max_new_tokens"] == 8 and record["finished"] is False
    judgements.feedback({"someone": "else's"})
    talk.rate(1)
    assert len(rows(judgements.feedback_file)) == 2  # once only
    talk.rate(-1)
    assert [r.get("rating") for r in rows(judgements.feedback_file)] == [None, -1]
    talk.rate(0)
    assert [r.get("rating") for r in rows(judgements.feedback_file)] == [None]
    assert judgements.feedback_file.name == "feedback-2.jsonl"


@pytest.mark.parametrize(("choice", "ranks", "chosen"), [("A", [1, 2], 0), ("B", [2, 1], 1), ("tie", [1, 1], 0)])
def test_a_choice_is_a_ranking_record_that_a_reward_model_reads(converse, judgements, choice, ranks, chosen):
    talk = converse("ppo", "base")
    shown = said(talk.ask("Who are you?", together=True))
    assert talk.choices == shown and talk.messages == [user("Who are you?")]
    talk.choose(choice)
    assert talk.messages[-1]["content"] == shown[chosen].text and not talk.choices
    [ranking] = load_records(judgements.labels_file, parse_ranking).records
    assert ranking.prompt == [user("Who are you?")] and ranking.annotator == "anna"
    assert ranking.responses == [a.text for a in shown] and ranking.ranks == ranks
    assert ranking.lineage["models"] == [a.model for a in shown] and ranking.lineage["round"] == 2
    assert rows(judgements.labels_file)[0]["blind"] is True
    assert judgements.labels_file.name == "labels-2.jsonl"


def test_two_models_are_shuffled_and_each_gives_its_own_answer_wherever_it_stands(converse):
    talk = converse("ppo", "sft")
    talk.shuffle = random.Random(0)
    orders, texts = set(), {}
    for _ in range(12):
        talk.clear()
        for a in said(talk.ask("Hi", together=True)):
            assert texts.setdefault(a.model, a.text) == a.text
        orders.add(tuple(talk.names))
    assert orders == {("ppo", "sft"), ("sft", "ppo")}
    one_after_the_other = converse("ppo", "sft")
    assert {a.model: a.text for a in said(one_after_the_other.ask("Hi"))} == texts


def test_equal_answers_are_no_choice_and_going_on_leaves_one(converse, judgements):
    talk = converse("ppo", "ppo", sampling=Sampling(8, temperature=0))
    said(talk.ask("Hi"))
    assert "the same" in talk.choose("A")
    said(talk.ask("And?"))
    said(talk.ask("And now?"))  # without a choice
    assert [m["role"] for m in talk.messages] == ["user", "assistant", "user", "assistant", "user"]
    assert not judgements.labels_file.exists()


def test_a_stopped_answer_keeps_what_it_has(converse):
    talk = converse("ppo")
    growing = talk.ask("Hi")
    for _ in range(3):
        [a] = next(growing)
    talk.stop()
    assert not list(growing)
    assert talk.messages[-1] == {"role": "assistant", "content": a.text} and not a.finished
    interrupted = talk.ask("Go on")
    next(interrupted)
    with pytest.raises(KeyboardInterrupt):
        interrupted.throw(KeyboardInterrupt)
    assert [m["role"] for m in talk.messages] == ["user", "assistant"] * 2


def test_the_oldest_turns_are_dropped_when_the_context_is_full(converse):
    talk = converse("ppo", system="Hello")
    dropped = []
    for turn in range(6):
        [a] = said(talk.ask(f"Who are you? {turn}"))
        dropped.append(talk.dropped)
        assert a.prompt[0]["role"] == "system" and a.prompt[-1] == user(f"Who are you? {turn}")
        assert len(a.prompt) == 2 * turn + 2 - talk.dropped
        [tokens] = encode_prompts(talk.assistants[0].tokenizer, [a.prompt])
        assert len(tokens) + 8 <= 96
    assert dropped[0] == 0 and dropped[-1] > 0 and dropped == sorted(dropped) and all(d % 2 == 0 for d in dropped)
    before = list(talk.messages)
    with pytest.raises(UserError, match=r"too long: with an answer of up to 8 tokens .* context of 96"):
        said(talk.ask("long " * 200))
    with pytest.raises(UserError, match="empty message"):
        said(talk.ask(" \n"))
    assert talk.messages == before


def test_a_conversation_is_saved_and_loaded(converse, tmp_path, judgements):
    talk = converse("ppo", system="You are the cat.")
    said(talk.ask("Who are you? 🐈"))
    file = tmp_path / "talk.json"
    file.write_text(talk.to_json(), encoding="utf-8")
    other = converse("sft")
    other.load(file)
    assert other.messages == talk.messages and other.system == "You are the cat."
    other.rate(-1)
    [record] = rows(judgements.feedback_file)
    assert record["model"] == "ppo"  # who said it
    assert record["prompt"] == [{"role": "system", "content": other.system}, talk.messages[0]]
    said(other.ask("And?"))
    assert len(other.messages) == 4
    for turns in (
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}],
        [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for role, text in (("user", "Hi"), ("model", "Ho"))
        ],
    ):
        other.from_json(json.dumps(turns))
        assert other.messages == [user("Hi"), {"role": "assistant", "content": "Ho"}]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", "a non-empty list"),
        ('[{"role": "user"}]', "each message needs 'role' and 'content'"),
        ('[{"role": "assistant", "content": "Hi"}]', "in turn"),
        ('[{"role": "system", "content": "Hi"}, 3]', "each message needs"),
        ('[{"role": "user", "content": "Hi"}, {"from": "function_call", "value": "{\\"name\\": \\"f\\"}"}]', "tools"),
        (r'[{"role": "user", "content": "\ud83d"}]', "half a character"),
        (None, "No such file"),
    ],
)
def test_what_is_no_conversation_is_refused_and_changes_nothing(converse, tmp_path, text, reason):
    file = tmp_path / "talk.json"
    if text is not None:
        file.write_text(text)
    talk = converse("ppo")
    said(talk.ask("Hi"))
    before = talk.to_json()
    with pytest.raises(UserError, match=reason):
        talk.load(file)
    assert talk.to_json() == before


def test_settings_are_checked(converse):
    talk = converse("ppo")
    talk.set_sampling(temperature=0.5, top_p=0.9)
    assert talk.sampling == replace(Sampling(8), temperature=0.5, top_p=0.9)
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"max_new_tokens": 0}, {"temperature": None}):
        with pytest.raises(UserError, match=f"^{next(iter(wrong))}="):
            talk.set_sampling(**wrong)
    assert talk.sampling.temperature == 0.5


def test_the_best_model_of_a_run_answers_unless_another_is_named(models, judgements):
    def loaded(**settings):
        return [(a.name, a.stops) for a in Chat({**models, "dpo": "/nowhere"}, judgements, **settings).load()]

    assert loaded() == [("ppo", ())]
    assert loaded(model="base", against="sft") == [("base", ("\nHuman:", "\nAssistant:")), ("sft", ())]
    assert loaded(model=models["sft"]) == [(models["sft"], ())]
    untuned = {"sft": models["base"], "base": models["base"]}  # a checkpoint that is chatted with as it is
    assert [a.name for a in Chat(untuned, judgements).load()] == ["base"]
    assert Chat(models, judgements).sampling.temperature == 0.7
    reasons = {"dpo": "/nowhere is not there; this run has ppo, sft, base", "pp": "give one of ppo, sft, base"}
    for wrong, reason in reasons.items():
        with pytest.raises(UserError, match=reason):
            loaded(model=wrong)
    with pytest.raises(UserError, match="no model yet"):
        Chat({"ppo": "/nowhere"}, judgements).load()
    with pytest.raises(UserError, match="device"):
        loaded(device="cuda:77")


def test_a_page_without_gradio_is_one_line(models, judgements, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "lit_rlhf.apps.chat.web", raising=False)
    with pytest.raises(UserError, match=r"chat.ui=web needs Gradio.*pip install 'lit-rlhf\[ui\]'"):
        Chat(models, judgements, ui="web").launch()
