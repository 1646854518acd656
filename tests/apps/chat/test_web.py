"""The page in a real browser."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from lit_rlhf.apps.chat.assistant import Assistant
from lit_rlhf.apps.display import printable
from lit_rlhf.rollouts import Sampling

pytest.importorskip("gradio", reason="the page needs Gradio (pip install 'lit-rlhf[ui]')")
REPO = Path(__file__).parents[3]
HOSTILE = "<img src=http://evil.test/x onerror=alert(1)><b>Who</b> & **you**?"


@dataclass(frozen=True)
class Slow(Assistant):
    """A model that takes its time, so that a person can stop it."""

    def answer(self, messages, sampling, seed):
        for grown in super().answer(messages, sampling, seed):
            time.sleep(0.05)
            yield grown


@pytest.fixture
def serve(served):
    """serve(begin) -> the address of a page on which each visit begins a conversation."""
    from lit_rlhf.apps.chat.web import ChatPage
    from lit_rlhf.apps.server import PageServer

    def start(begin):
        server = PageServer("chat")
        served(ChatPage(begin).guarded(server), server)
        return server.address

    return start


@pytest.fixture
def visit(chromium):
    """visit(address) -> the page; in the end it is checked that nothing failed, or was asked of any other host."""
    elsewhere, tabs, problems = [], [], []

    def visit(address, width=1280):
        tab = chromium.new_page(viewport={"width": width, "height": 800})
        tab.set_default_timeout(10_000)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("console", lambda message: problems.append(message.text) if "Content Security" in message.text else None)
        tab.on("request", lambda request: elsewhere.append(request.url))
        tab.goto(address)
        tab.wait_for_selector("#box textarea")
        tabs.append(tab)
        return tab

    yield visit
    for tab in tabs:
        tab.close()
    assert not problems, problems  # among them what the content security policy keeps from running
    assert not [url for url in elsewhere if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))]


def ask(tab, text):
    tab.fill("#box textarea", text)
    tab.press("#box textarea", "Enter")


def bubbles(tab, who):
    return [element.inner_text() for element in tab.query_selector_all(f"#talk [data-testid={who}] .md")]


def wait(condition, seconds=10.0):
    """Until a condition holds; what was seen last is what is then asserted."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    assert condition()


def rows(path):
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def as_shown(text):
    return " ".join(printable(text).split())


def test_a_person_talks_stops_regenerates_rates_saves_and_loads(converse, judgements, serve, visit, tmp_path):
    talks = []

    def begin():
        talk = converse("ppo", sampling=Sampling(16))
        talk.assistants = [Slow(a.name, a.policy, a.tokenizer, a.stops) for a in talk.assistants]
        talks.append(talk)
        return talk

    tab = visit(serve(begin))
    ask(tab, HOSTILE)
    seen = set()
    wait(lambda: seen.update(map(len, bubbles(tab, "bot"))) or len(seen) > 3)  # it grows before it is there
    wait(lambda: talks[-1].messages[1:])
    talk = talks[-1]
    wait(lambda: [as_shown(t) for t in bubbles(tab, "bot")] == [as_shown(talk.messages[1]["content"])])
    assert bubbles(tab, "user") == [HOSTILE] and talk.messages[0]["content"] == HOSTILE
    assert not tab.query_selector("#talk .md img, #talk .md b")

    tab.click("#talk button[aria-label=Like]")
    wait(lambda: [r["rating"] for r in rows(judgements.feedback_file)] == [1])
    assert rows(judgements.feedback_file)[0]["response"] == talk.messages[1]["content"]
    wait(lambda: "feedback-2.jsonl" in tab.inner_text("#notice"))
    tab.click("#talk button[aria-label=Dislike]")
    wait(lambda: [r["rating"] for r in rows(judgements.feedback_file)] == [-1])
    time.sleep(0.5)
    tab.click("#talk button[aria-label*=islike]")
    wait(lambda: not rows(judgements.feedback_file))  # taken back

    with tab.expect_download() as download:
        tab.click("#save a")
    file = tmp_path / "talk.json"
    download.value.save_as(file)
    assert json.loads(file.read_text()) == [talk.messages[0], {**talk.messages[1], "model": "ppo"}]

    first = talk.messages[1]["content"]
    tab.click("#regenerate")
    wait(lambda: len(talk.messages) == 2 and talk.messages[1]["content"] != first)
    tab.wait_for_selector("#box .submit-button")  # the page has what the model is done with

    tab.click("#settings button")
    tab.click("#system textarea")
    tab.keyboard.type("You are the cat.")  # key by key: a box that has just opened may miss a text put whole into it
    ask(tab, "Go on")
    tab.wait_for_selector("#box .stop-button")
    wait(lambda: any(len(answer) > 1 for answer in bubbles(tab, "bot")[1:]))
    tab.click("#box .stop-button")
    wait(lambda: len(talk.messages) == 4)
    stopped = talk.answers[3]
    *_, whole = talk.assistants[0].answer(stopped.prompt, stopped.sampling, (talk.seed, talk.drawn, 0))
    assert whole.text.startswith(stopped.text) and len(whole.text) > len(stopped.text) > 0 and not stopped.finished
    assert stopped.prompt[0] == {"role": "system", "content": "You are the cat."}

    tab.wait_for_selector("#box .submit-button")
    with tab.expect_file_chooser() as chooser:
        tab.click("#load")
    chooser.value.set_files(file)
    wait(lambda: [m["content"] for m in talk.messages] == [HOSTILE, first])
    wait(lambda: bubbles(tab, "user") == [HOSTILE])
    ask(tab, "long " * 300)
    wait(lambda: "too long" in tab.inner_text("#notice"))
    assert tab.input_value("#box textarea").startswith("long long")  # to be corrected


def test_two_answers_side_by_side_blind(converse, judgements, serve, visit):
    talks = []

    def begin():
        talks.append(converse("ppo", "base"))
        return talks[-1]

    tab = visit(serve(begin), width=390)
    ask(tab, HOSTILE)
    wait(lambda: talks[-1].choices and tab.is_enabled("#choose-b"))
    talk = talks[-1]
    answers = list(talk.choices)
    for place, a in zip("ab", answers):
        wait(lambda place=place, a=a: as_shown(a.text) == as_shown(tab.inner_text(f"#answer-{place} .text")))
        assert a.model not in tab.inner_text(f"#answer-{place} h3")
    tab.click("#names")
    wait(lambda: tab.inner_text("#answer-a h3") == f"A {answers[0].model}")
    tab.click("#names")
    wait(lambda: tab.inner_text("#answer-a h3") == "A")
    tab.click("#choose-b")
    wait(lambda: rows(judgements.labels_file))
    [record] = rows(judgements.labels_file)
    assert record["responses"] == [a.text for a in answers] and record["ranks"] == [2, 1]
    assert record["models"] == [a.model for a in answers]
    wait(lambda: [as_shown(t) for t in bubbles(tab, "bot")] == [as_shown(answers[1].text)])
    assert not tab.is_visible("#choose-b")
    width = tab.evaluate("document.documentElement.scrollWidth")
    assert width <= 390  # nothing has to be scrolled sideways on a phone


def test_two_visitors_have_their_own_conversations(converse, serve, visit):
    address = serve(lambda: converse("ppo"))
    tabs = visit(address), visit(address)
    for tab, text in zip(tabs, ("Hello", "Who are you?")):
        ask(tab, text)
    for tab, text in zip(tabs, ("Hello", "Who are you?")):
        wait(lambda tab=tab, text=text: bubbles(tab, "user") == [text] and len(bubbles(tab, "bot")) == 1)


LAUNCH = """
import sys
from lit_rlhf.apps.chat import Chat, Judgements
from lit_rlhf.rollouts import Sampling
model, folder, port = sys.argv[1:]
kept = Judgements(folder, round=2, annotator="anna")
Chat({"ppo": model}, kept, ui="web", port=int(port), sampling=Sampling(8)).launch()
"""


def test_the_server_is_killed_and_nothing_is_lost_or_doubled(models, judgements, visit, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", LAUNCH, models["ppo"], str(judgements.folder), port]

    def start():
        server = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(REPO)}
        )
        servers.append(server)
        return server.stdout.readline().split()[1]

    servers = []
    try:
        tab = visit(start())
        ask(tab, "Who are you?")
        wait(lambda: len(bubbles(tab, "bot")) == 1 and tab.is_visible("#box .submit-button"))
        first = bubbles(tab, "bot")
        tab.click("#talk button[aria-label=Like]")
        wait(lambda: [r["rating"] for r in rows(judgements.feedback_file)] == [1])
        wait(lambda: "feedback-2.jsonl" in tab.inner_text("#notice"))
        servers[-1].kill()
        servers[-1].wait()
        with tab.expect_download() as download:  # between the thumb and "Save"
            tab.click("#save a")
        download.value.save_as(tmp_path / "talk.json")
        start()
        ask(tab, "And?")  # on the page that was open all the while
        wait(lambda: bubbles(tab, "user") == ["Who are you?", "And?"] and len(bubbles(tab, "bot")) == 2, 30)
        wait(lambda: tab.is_visible("#box .submit-button"))
        assert bubbles(tab, "bot")[:1] == first
        before = rows(judgements.feedback_file)[0]
        tab.click("#talk button[aria-label=Dislike] >> nth=0")
        wait(lambda: rows(judgements.feedback_file) == [{**before, "rating": -1}], 30)

        other = visit(f"http://127.0.0.1:{port}")
        with other.expect_file_chooser() as chooser:
            other.click("#load")
        chooser.value.set_files(tmp_path / "talk.json")
        wait(lambda: bubbles(other, "bot") == first)
        other.click("#talk button[aria-label*=islike]")  # it is there, and goes
        wait(lambda: not rows(judgements.feedback_file))
    finally:
        for server in servers:
            server.kill()
            server.communicate()
