"""The labelling page in a real browser, with the real server behind it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from lit_rlhf.apps.label import LabellingPage
from lit_rlhf.errors import UserError
from lit_rlhf.text.records import parse_demonstration, parse_ranking

REPO = Path(__file__).parents[3]


@pytest.fixture
def visit(chromium):
    """Open the page as a person: visit(address, "ann") -> page. Each has a browser profile of their own."""
    contexts, problems = [], []

    def open_(address, who, context=None, **settings):
        if context is None:
            context = chromium.new_context(**{"viewport": {"width": 1280, "height": 800}, **settings})
            contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda said: problems.append(said.text) if "Content Security" in said.text else None)
        page.on("request", lambda r: None if r.url.startswith((address, "data:")) else problems.append(r.url))
        page.goto(f"{address}/?annotator={who}")
        page.wait_for_selector("body[data-turn]")
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not problems, problems  # no error in the script, and nothing asked of any other place


def turn(page):
    return int(page.get_attribute("body", "data-turn"))


def keys(page, pressed):
    """Press keys and wait until the server has taken the step that they end in."""
    before = turn(page), page.get_attribute("body", "data-item")
    for key in pressed:
        page.keyboard.press(key)
    page.wait_for_function(
        "([turn, item]) => [document.body.dataset.turn, document.body.dataset.item].join() != [turn, item].join()",
        arg=list(map(str, before)),
    )
    page.wait_for_selector("body:not(.busy)")


def by_quality(page):
    """The keys of the answers on the page, from best to worst, by what their text says."""
    texts = page.locator("#answers article .text").all_inner_texts()
    return sorted("1234567890abcdef"[: len(texts)], key=lambda key: -int(texts[int(key, 16) - 1].split()[-1]))


def qualities(record):
    """Quality by rank: what the record says, read without the page."""
    return [int(text.split()[-1]) for _, text in sorted(zip(record["ranks"], record["responses"]))]


def test_ten_prompts_ranked_by_keys_are_exactly_those_records(serve, visit, files):
    rows = files.answers(10, k=4)
    page = visit(serve(rows, repeat=0.1), "ann")
    for n in range(11):  # one of them comes a second time
        kept = [*files.read(files.folder / "labels-0.jsonl"), *files.read(files.folder / "aside-labels-0.jsonl")]
        assert len(kept) == n  # all that was judged is on disk before the next one shows
        keys(page, [*by_quality(page), "Enter"])
    assert page.inner_text("#done") == "10 of 10"
    assert "All judged" in page.inner_text("#finished")
    assert "self-agreement 100% (6 of 6 pairs)" in page.inner_text(".figures")
    records = files.read(files.folder / "labels-0.jsonl")
    assert len(records) == 10
    source = {row["prompt"][0]["content"]: row for row in rows}
    for record in records:
        row = source.pop(record["prompt"][0]["content"])
        assert record["responses"] == row["responses"]
        # Quality 3 is best: rank 1; quality 0 is rank 4. Worked out from the texts alone.
        assert record["ranks"] == [4 - int(text.split()[-1]) for text in row["responses"]]
        assert record["annotator"] == "ann" and record["seconds"] >= 0
        assert (record["round"], record["model"], record["kind"]) == (0, "sft", "fact")
        assert parse_ranking(record).lineage == {"round": 0, "model": "sft", "kind": "fact"}
    assert not source
    assert len({tuple(r["shown"]) for r in records}) > 3  # the places say nothing of the answers


def test_ties_skip_undo_and_note_by_keys(serve, visit, files):
    page = visit(serve(files.answers(4, k=3)), "ann")
    best, middle, worst = by_quality(page)
    keys(page, [best, "=", middle, worst, "Enter"])
    [record] = files.read(files.folder / "labels-0.jsonl")
    assert sorted(record["ranks"]) == [1, 1, 2] and qualities(record)[-1] == 0
    skipped = page.inner_text("#prompt")
    keys(page, "s")
    assert page.inner_text("#skipped") == "1 skipped" and page.inner_text("#prompt") != skipped
    keys(page, "u")
    assert page.inner_text("#prompt") == skipped
    keys(page, "u")  # back to the first one, as it was ranked
    assert page.inner_text("#strip .tier >> nth=0").split() == [min(best, middle), "=", max(best, middle)]
    assert page.inner_text("#strip .tier >> nth=1") == worst
    assert files.read(files.folder / "labels-0.jsonl") == []
    page.keyboard.press("Backspace")  # takes the worst out
    page.keyboard.press("Backspace")  # and one of the two equal ones
    page.keyboard.press("Backspace")
    page.keyboard.press(best)
    page.keyboard.press("Enter")
    assert "Rank the others too" in page.inner_text("#error")
    page.keyboard.press("n")
    page.keyboard.type("s, u and 1 are letters here")
    page.keyboard.press("Enter")
    keys(page, [middle, "Enter"])  # the last one left is the worst
    [record] = files.read(files.folder / "labels-0.jsonl")
    assert qualities(record) == [2, 1, 0] and record["note"] == "s, u and 1 are letters here"


def test_a_reload_keeps_the_place_and_what_was_begun(serve, visit, files):
    page = visit(serve(files.answers(3, k=3)), "ann")
    keys(page, [*by_quality(page), "Enter"])
    shown, item = page.locator("#answers article .text").all_inner_texts(), page.get_attribute("body", "data-item")
    best, middle, worst = by_quality(page)
    page.keyboard.press(best)
    page.reload()
    page.wait_for_selector("#answers article")
    assert page.get_attribute("body", "data-item") == item
    assert page.locator("#answers article .text").all_inner_texts() == shown
    keys(page, [middle, worst, "Enter"])
    assert [qualities(r) for r in files.read(files.folder / "labels-0.jsonl")] == [[2, 1, 0]] * 2


def test_two_windows_of_one_person_and_a_second_person(serve, visit, files):
    address = serve(files.answers(2, k=3))
    one = visit(address, "ann")
    two = visit(address, "ann", context=one.context)
    other = visit(address, "bob")
    assert one.get_attribute("body", "data-item") == two.get_attribute("body", "data-item")
    keys(one, [*by_quality(one), "Enter"])
    keys(other, [*by_quality(other), "Enter"])
    keys(two, [*reversed(by_quality(two)), "Enter"])  # the same item once more
    assert "done in another window" in two.inner_text("#message")
    assert two.get_attribute("body", "data-item") == one.get_attribute("body", "data-item")
    keys(two, [*by_quality(two), "Enter"])
    keys(other, [*by_quality(other), "Enter"])
    records = files.read(files.folder / "labels-0.jsonl")
    assert sorted((r["annotator"], r["prompt"][0]["content"]) for r in records) == [
        (who, f"Question {n}?") for who in ("ann", "bob") for n in range(2)
    ]
    assert all(qualities(r) == [2, 1, 0] for r in records)


def test_answers_are_text_whatever_they_hold_and_long_ones_scroll(serve, visit, files):
    nasty = "<script>document.title = 'hacked'</script><img src=x onerror=\"document.title = 'hacked'\"> & <b>bold</b>"
    hebrew = "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd \U0001f600\U0001f469\u200d\U0001f680"
    long = "word " * 20_000
    row = {"prompt": f"{nasty} {hebrew}", "responses": [nasty, hebrew, long, ""]}
    for viewport in ({"width": 1280, "height": 800}, {"width": 390, "height": 844}):
        page = visit(serve([row], round=viewport["width"]), "ann", viewport=viewport)
        texts = [text.text_content() for text in page.locator("#answers article .text").all()]
        assert sorted(texts) == sorted([nasty, hebrew, long, "(empty)"])
        assert page.text_content("#prompt .text") == f"{nasty} {hebrew}"
        assert page.title() == "Labelling · lit-rlhf"
        place = texts.index(long)
        sizes = "node => [node.scrollHeight, node.clientHeight]"
        whole, seen = page.locator("#answers article .text").nth(place).evaluate(sizes)
        assert whole > 5000 and seen < 600
        assert page.evaluate("document.documentElement.scrollWidth") == viewport["width"]  # nothing sticks out
        rtl = page.locator("#answers article .text").nth(texts.index(hebrew))
        assert rtl.evaluate("node => getComputedStyle(node).direction") == "rtl"
    best = str(texts.index(hebrew) + 1)
    keys(page, [best, *[k for k in "1234" if k != best], "Enter"])
    [record] = files.read(files.folder / "labels-390.jsonl")
    assert record["responses"] == [nasty, hebrew, long, ""] and record["ranks"][1] == 1


def test_tools_their_calls_and_what_they_said_are_shown(serve, visit, files):
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    prompt = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Is it "}, {"type": "text", "text": "cold?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "-3 degrees"},
    ]
    tools = [{"type": "function", "function": {"name": "weather", "description": "Of a city, now."}}]
    page = visit(serve([{"prompt": prompt, "tools": tools, "responses": ["Yes.", "No."]}]), "ann")
    shown = [
        (t.locator(".role").inner_text(), t.locator(".text").inner_text()) for t in page.locator("#prompt .turn").all()
    ]
    assert [role for role, _ in shown] == ["Tools", "Setting", "Person", "Assistant", "Tool"]
    assert json.loads(shown[0][1]) == tools
    assert json.loads(shown[3][1]) == [call["function"]]
    assert [text for _, text in (shown[1], shown[2], shown[4])] == ["Be brief.", "Is it cold?", "-3 degrees"]
    keys(page, ["1", "2", "Enter"])
    [record] = files.read(files.folder / "labels-0.jsonl")
    assert record["tools"] == tools and record["prompt"] == prompt


def test_ranking_by_dragging(serve, visit, files):
    page = visit(serve(files.answers(1, k=4)), "ann", viewport={"width": 390, "height": 844})
    first, second, third, fourth = by_quality(page)

    def drag(key, onto, part):
        start = page.locator(f"#strip .chip:text-is('{key}')").bounding_box()
        there = page.locator(onto).bounding_box()
        page.mouse.move(start["x"] + 20, start["y"] + 20)
        page.mouse.down()
        page.mouse.move(there["x"] + there["width"] * part, there["y"] + 22, steps=5)
        page.mouse.up()

    def strip():
        said = page.inner_text("#strip").replace("\u203a", ">")
        return said.split("worst")[0].split()[1:]

    drag(second, "#strip .slot", 0.5)
    drag(fourth, "#strip .tier >> nth=0", 1.0)  # behind it
    drag(first, "#strip .tier >> nth=0", 0.0)  # before it
    assert strip() == [first, ">", second, ">", fourth, "…"]
    drag(third, "#strip .tier >> nth=1", 0.5)  # onto it: equal
    assert strip() == [first, ">", second, "=", third, ">", fourth]
    drag(third, "#strip .tier >> nth=2", 0.05)  # between
    assert strip() == [first, ">", second, ">", third, ">", fourth]
    page.click("#submit")
    page.wait_for_selector("#finished:not([hidden])")
    [record] = files.read(files.folder / "labels-0.jsonl")
    assert qualities(record) == [3, 2, 1, 0]


def test_rating_and_writing(serve, visit, files):
    rows = [{"prompt": "Why?", "responses": ["So, quality 1", "No, quality 0"], "model": "sft"}]
    page = visit(serve(rows, mode="rate"), "ann")
    for _ in range(2):
        key = "2" if "quality 1" in page.inner_text("#answers") else "1"
        keys(page, [key, "Enter"])
    feedback = files.read(files.folder / "feedback-0.jsonl")
    assert {(r["response"], r["rating"]) for r in feedback} == {("So, quality 1", 1), ("No, quality 0", -1)}
    assert all(r["model"] == "sft" and r["annotator"] == "ann" for r in feedback)

    page = visit(serve(rows, mode="write"), "ann")
    assert page.input_value("#text") == "So, quality 1"
    page.keyboard.press("Control+A")
    page.keyboard.type("Because.\nuns")  # keys are letters while one writes
    page.reload()
    page.wait_for_selector("#text")
    assert page.input_value("#text") == "Because.\nuns"
    keys(page, ["Control+Enter"])
    [record] = files.read(files.folder / "demonstrations-0.jsonl")
    assert parse_demonstration(record).messages[-1] == {"role": "assistant", "content": "Because.\nuns"}
    keys(page, "u")
    assert page.input_value("#text") == "Because.\nuns" and not files.read(files.folder / "demonstrations-0.jsonl")


def test_the_command_is_killed_and_started_again_and_nothing_is_lost_or_doubled(
    serve, visit, files, free_port, tmp_path
):
    folder = tmp_path / "runs" / "mine" / "data"
    source = files.write(folder / "answers-0.jsonl", files.answers(6, k=3))
    command = [sys.executable, "-m", "lit_rlhf", "stage=label", "run=mine", "label.repeat=0", f"label.port={free_port}"]
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    try:
        said = server.stdout.readline()
        address = f"http://127.0.0.1:{free_port}"
        assert f"6 to rank at {address}" in said
        trains = "lit-rlhf run=mine from_run=mine stage=reward reward/data=jsonl reward.data.path=runs/mine/data/labels"
        assert trains in fetch(f"{address}/api/about")[2]
        page = visit(address, "ann")
        for _ in range(2):
            keys(page, [*by_quality(page), "Enter"])
    finally:
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
    ranking = by_quality(page)
    for key in [*ranking, "Enter"]:
        page.keyboard.press(key)
    page.wait_for_selector("#offline:not([hidden])")
    assert "Nothing is lost" in page.inner_text("#offline")
    before = turn(page)
    files.folder = folder
    serve(source, port=free_port)  # the same records, the same files
    page.wait_for_function("turn => Number(document.body.dataset.turn) > turn", arg=before)
    page.wait_for_selector("#offline", state="hidden")
    for _ in range(3):
        keys(page, [*by_quality(page), "Enter"])
    records = files.read(folder / "labels-0.jsonl")
    assert sorted(r["prompt"][0]["content"] for r in records) == [f"Question {n}?" for n in range(6)]
    assert [r["turn"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert all(qualities(r) == [2, 1, 0] for r in records)


def fetch(address, host="127.0.0.1", data=None, kind="application/json"):
    """(status, headers, text) of a request."""
    request = urllib.request.Request(address, data, {"Host": host, "Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, response.headers, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def test_what_is_wrong_is_said_in_one_line(serve, files, tmp_path):
    address = serve(files.answers(1))
    with pytest.raises(UserError, match=r"label\.port=\d+: cannot listen"):
        LabellingPage(tmp_path / "source.jsonl", tmp_path / "else", port=int(address.rsplit(":")[-1])).launch()
    with pytest.raises(UserError, match=r"there are no collected answers yet\. Run stage=preference"):
        LabellingPage(tmp_path / "answers-0.jsonl", tmp_path).items()
    with pytest.raises(UserError, match=r"label\.instructions=.*no such file"):
        LabellingPage(tmp_path / "source.jsonl", tmp_path / "else", instructions="none.txt").about()
    files.write(tmp_path / "bad.jsonl", [{"prompt": "Why?"}])
    with pytest.raises(UserError, match=r"bad\.jsonl:1: no 'response'"):
        LabellingPage(tmp_path / "bad.jsonl", tmp_path).items()
    files.write(tmp_path / "others.jsonl", [{"q": "Why?", "info": {"answers": ["a", "b"]}}])
    fields = {"prompt": "q", "responses": "info.answers"}
    [item] = LabellingPage(tmp_path / "others.jsonl", tmp_path, fields=fields).items()
    assert (item.prompt[0]["content"], item.responses, item.others) == ("Why?", ["a", "b"], {})


def test_someone_who_comes_without_a_name_is_asked(serve, chromium, files):
    page = chromium.new_page()
    page.goto(serve(files.answers(2)))
    page.wait_for_selector("#start:not([hidden])")
    page.keyboard.type("Ann B.")
    page.keyboard.press("Enter")
    page.wait_for_selector("#answers article")
    assert page.inner_text("#who") == "Ann B."
    assert "Helpful" in page.inner_text("#instructions") and "Harmless" in page.inner_text("#instructions")
    page.close()


IN_A_CELL = """
import asyncio, signal, sys
from lit_rlhf.apps.label import LabellingPage
signal.signal(signal.SIGINT, signal.default_int_handler)  # as a notebook has it; a job in the background has not

async def cell():
    LabellingPage(sys.argv[1], sys.argv[2], port=int(sys.argv[3])).launch()
    print("the next cell")

asyncio.new_event_loop().run_until_complete(cell())  # asyncio.run answers to SIGINT itself, a notebook does not
"""


def test_in_a_notebook_the_page_serves_until_the_cell_is_interrupted(files, free_port):
    """A notebook's cells run inside an event loop, and interrupting one is a SIGINT."""
    source = files.write(files.folder / "source.jsonl", files.answers(1))
    arguments = [str(source), str(files.folder), str(free_port)]
    command = [sys.executable, "-c", IN_A_CELL, *arguments]
    notebook = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    status = None
    while status is None and notebook.poll() is None:
        try:
            status = urllib.request.urlopen(f"http://127.0.0.1:{free_port}", timeout=5).status
        except OSError:
            time.sleep(0.05)
    notebook.send_signal(signal.SIGINT)
    said, errors = notebook.communicate(timeout=60)
    assert status == 200, errors
    assert "the next cell" in said, errors
    with socket.socket() as sock:
        assert sock.connect_ex(("127.0.0.1", free_port)) != 0  # the server has ended
