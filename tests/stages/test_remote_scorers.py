"""Rewards from a server: a language model that rates answers, a scorer of one's own; a real server answers here."""

import json
import time

import pytest
import torch
from judge_server import JudgeServer, completion

from lit_rlhf.errors import UserError
from lit_rlhf.models import critic_from_reward_model
from lit_rlhf.stages.ppo import MonteCarlo, Scoring
from lit_rlhf.stages.preference import RewardModelAnnotator
from lit_rlhf.stages.remote_scorers import HTTPScorer, LLMScorer, rating_of

PROMPTS = [[{"role": "user", "content": text}] for text in ("first?", "second?", "third?")]
ANSWERS = ["a", "bbb", "cc"]
CANARY = "sk-canary-7f3a90e1c2"
FAST = {"retries": 1, "backoff": 0.01, "timeout": 5.0}


class Rates(JudgeServer):
    """Rates answers: ``said`` of an answer is a number, a text, a status, seconds to wait for, or None."""

    def __init__(self):
        self.said, self.asked, self.seen = (lambda answer: float(len(answer))), [], []
        super().__init__(self.answer)

    def answer(self, request):
        body = json.loads(request.body)
        self.seen.append((request.path, request.headers.get("Authorization"), body))
        chat = "messages" in body
        text = body["messages"][-1]["content"] if chat else None
        answers = [text.split("The answer:\n")[1].split("\n\nYour rating")[0]] if chat else self.of(body)
        self.asked += answers
        said = [self.said(answer) for answer in answers]
        if status := next((s for s in said if isinstance(s, int)), None):
            return status, CANARY.encode(), {}
        if chat:
            return 200, completion(str(said[0])), {}
        return 200, json.dumps(self.reply(said)).encode(), {}

    def of(self, body):
        return body["responses"]

    def reply(self, said):
        return {"scores": said}


@pytest.fixture
def server():
    server = Rates()
    yield server
    server.close()


@pytest.fixture(params=["llm", "http"])
def scorer(request, server, tmp_path):
    """(settings) -> a scorer that asks the server; its scores are the lengths of answers."""

    def make(**settings):
        settings = {**FAST, "progress_file": tmp_path / "scores.jsonl", **settings}
        if request.param == "llm":
            return LLMScorer(server.url, "stub", lowest=0, highest=1000, **settings)
        return HTTPScorer(f"{server.address}/score", **{"batch_size": 2, **settings})

    make.kind = request.param
    return make


def test_each_answer_is_asked_about_once_and_kept(scorer, server):
    assert scorer()(PROMPTS, ANSWERS) == [1.0, 3.0, 2.0]
    assert sorted(server.asked) == ["a", "bbb", "cc"]
    assert len(server.seen) == (3 if scorer.kind == "llm" else 2)  # in batches of two
    assert scorer()([*PROMPTS, PROMPTS[0]], [*ANSWERS, "dddd"]) == [1.0, 3.0, 2.0, 4.0]  # what is on disk is known
    assert len(server.asked) == 4
    again = scorer(progress_file=None)
    assert again(PROMPTS * 2, ANSWERS * 2) == [1.0, 3.0, 2.0] * 2 and len(server.asked) == 7


def test_a_server_that_fails_slows_down_or_goes_loses_nothing(scorer, server, monkeypatch):
    monkeypatch.setenv("MY_KEY", CANARY)
    times = []

    def flaky(answer):
        times.append(answer)
        if times.count(answer) == 1:
            return 503 if answer == "a" else time.sleep(0.4) or float(len(answer))
        return float(len(answer))

    server.said = flaky
    assert scorer(timeout=0.2, api_key_env="MY_KEY", retries=2)(PROMPTS, ANSWERS) == [1.0, 3.0, 2.0]
    server.said = lambda answer: 500 if answer == "eee" else float(len(answer))
    with pytest.raises(UserError) as error:
        settings = {"batch_size": 1} if scorer.kind == "http" else {}
        scorer(api_key_env="MY_KEY", concurrency=1, **settings)([PROMPTS[0]] * 3, ["dd", "eee", "f"])
    said = str(error.value)
    assert "reward_model: http://127.0.0.1" in said and "did not answer (HTTP 500 [secret]) in 2 attempts" in said
    assert "4 scores are kept in " in said and "it goes on" in said and "\n" not in said and CANARY not in said
    server.said, before = (lambda answer: float(len(answer))), len(server.asked)
    assert scorer()([PROMPTS[0]] * 3, ["dd", "eee", "f"]) == [2.0, 3.0, 1.0]
    assert len(server.asked) - before == 2  # only what was open
    assert {key for _, key, _ in server.seen} == {f"Bearer {CANARY}", None}


def test_replies_that_are_no_scores(server, tmp_path):
    wrong = HTTPScorer(f"{server.address}/score", **FAST)
    for reply, message in (
        ({"scores": [1.0]}, r"a list of 1 where 3 scores were expected \(scores\)"),
        ({"points": [1.0]}, "no 'scores' in its reply, which has points; reply= says where the scores are"),
        ([1.0, 2.0, 3.0], r"no 'scores' in its reply, which is '\[1.0, 2.0, 3.0\]'"),
        ({"scores": [1.0, True, 2.0]}, "True is no score"),
        ({"scores": [[1.0], [1.0], [2.0]]}, r"\[1.0\] is no score"),
        ({"scores": "many"}, "a str where 3 scores were expected"),
        ({"scores": [1.0, "x", 2.0]}, "could not convert string to float: 'x'"),
        ({"scores": [1.0, float("nan"), 2.0]}, "nan is no score"),
        ({"scores": [1.0, 1e39, 2.0]}, r"1e\+39 is no score"),  # infinity, as float32
    ):
        server.reply = lambda said, reply=reply: reply
        with pytest.raises(UserError, match=rf"did not answer \(.*{message}.*the last on 3 answers, the first to the"):
            wrong(PROMPTS, ANSWERS)
    server.said = lambda answer: "As an assistant I cannot rate this."
    with pytest.raises(UserError, match=r"stub gave no rating of 3 of 3 answers, the first to the prompt 'first\?'"):
        LLMScorer(server.url, "stub", **FAST)(PROMPTS, ANSWERS)


def test_nothing_may_be_said_of_an_answer(scorer, server, tmp_path):
    server.said = lambda answer: None if answer == "a" else float(len(answer))
    assert scorer()(PROMPTS, ANSWERS) == [None, 3.0, 2.0]
    before = len(server.asked)
    assert scorer()(PROMPTS, ANSWERS) == [None, 3.0, 2.0]  # null is a reply; a reply without a number is none
    assert len(server.asked) - before == (2 if scorer.kind == "llm" else 0)


def test_a_server_of_another_form(server):
    server.of = lambda body: [text.rpartition("Assistant: ")[2] for text in body["query"]]
    server.reply = lambda said: {"data": {"rewards": said}}
    scorer = HTTPScorer(
        f"{server.address}/get_reward", fields={"texts": "query", "answer": "labels"}, reply="data.rewards", **FAST
    )
    assert scorer(PROMPTS[:2], ANSWERS[:2], answer=["x", None]) == [1.0, 3.0]
    [(path, _, body)] = server.seen
    assert path == "/get_reward" and body["labels"] == ["x", None]
    assert body["query"] == ["Human: first?\n\nAssistant: a", "Human: second?\n\nAssistant: bbb"]
    with pytest.raises(UserError, match=r"reward_model.fields: there is no 'answer' of an answer; there are prompts"):
        scorer(PROMPTS, ANSWERS)


def test_a_judge_is_shown_tools_and_no_control_tokens(server):
    server.said = lambda answer: "I say 7/10."
    assert LLMScorer(server.url, "stub", **FAST)(PROMPTS[:1], ["it is"]) == [7.0]
    server.seen.clear()
    LLMScorer(server.url, "stub", **FAST)(PROMPTS[:1], ["a<|im_end|>b"], tools=[[{"name": "add"}]])
    text = server.seen[0][2]["messages"][1]["content"]
    assert 'may call: [{"name": "add"}]\n\nuser: first?' in text and "a< |im_end|>b" in text
    assert server.seen[0][2]["messages"][0]["content"].endswith("from 1 (worst) to 10 (best).")


@pytest.mark.parametrize(("reply", "rating"), [
    ("7", 7.0), ("So: 7/10", 7.0), ("3 out of 10.", 3.0), ("**9.5**", 9.5), ("<think>3</think>\n5 of 10", 5.0),
    ("Between 4 and 6", None), ("0", None), ("-3", None), ("11", None), ("Good.", None), ("", None), ("v2: 6", 6.0),
])  # fmt: skip
def test_ratings(reply, rating):
    assert rating_of(reply, 1, 10) == rating


def test_settings_that_cannot_be():
    with pytest.raises(UserError, match=r"url \(reward_model\): http://... or https://... was expected"):
        HTTPScorer("localhost:8000")
    with pytest.raises(UserError, match="lowest=5 and highest=5; the highest rating must be above"):
        LLMScorer("http://x", "m", lowest=5, highest=5)


# ------------------------------------------------------------------ in the stages


@pytest.mark.parametrize("advantage", ["ppo", "grpo"])
def test_ppo_learns_from_what_a_server_says_and_goes_on_when_it_is_back(advantage, scorer, server, ppo, prompts, fit):
    def make():
        settings = {"kl_coef": 0.0, "scoring": Scoring(missing_eos_penalty=0.0, scale="none")}
        if advantage == "grpo":
            settings |= {"advantage": MonteCarlo(baseline="prompt", divide_by_std=True), "answers_per_prompt": 2}
        return ppo(reward_model=scorer(retries=0), **settings)

    server.said = lambda answer: None if answer.startswith("e") else float(len(answer))
    whole = make()
    fit(whole, prompts(batch_size=4), folder="whole", max_epochs=1, limit_train_batches=2)
    asked = len(server.asked)
    server.said = lambda answer: 500  # gone: what was said of these very answers is on disk, and the run is the same
    again = make()
    fit(again, prompts(batch_size=4), folder="again", max_epochs=1, limit_train_batches=2)
    assert len(server.asked) == asked
    for one, other in zip(whole.rollouts, again.rollouts):
        assert torch.equal(one.rewards, other.rewards)
    assert whole.scorer.name == whole.scorer.reward_model.name and whole.scorer.unit == "reward units"
    with pytest.raises(UserError, match=r"did not answer .*scores are kept in .*it goes on"):
        fit(make(), prompts(batch_size=4, seed=5), folder="gone", max_epochs=1, limit_train_batches=1)


def test_an_annotator_and_a_critic(scorer, policy, capsys):
    assert RewardModelAnnotator(scorer())(PROMPTS[:1], [ANSWERS]) == [[3, 1, 2]]
    critic_from_reward_model(policy, scorer())
    assert "the critic begins as the policy" in capsys.readouterr().out


def test_in_a_dry_run_nobody_is_asked(server, tmp_path):
    with torch.device("meta"):
        scorer = HTTPScorer(server.url, progress_file=tmp_path / "scores.jsonl")
    assert scorer(PROMPTS, ANSWERS) == [0.0] * 3 and not server.seen and not (tmp_path / "scores.jsonl").exists()
