"""Queues and files of the labelling page, without the page."""

import json
import threading

import pytest

from lit_rlhf.apps.chat import Judgements
from lit_rlhf.apps.label import Item, Labelling, Rank, Rate, Write
from lit_rlhf.apps.label.queue import REPEAT_AFTER
from lit_rlhf.errors import UserError
from lit_rlhf.text.records import load_records, parse_ranking


def items(n, k=3):
    return [Item([{"role": "user", "content": f"q{i}"}], [f"a{i}.{j}" for j in range(k)]) for i in range(n)]


@pytest.fixture
def open_(files):
    """Open the files with n items, as a server that starts does; what was open before is let go, as by a killed one."""
    opened = []

    def start(n=4, task=None, **settings):
        for labelling in opened:
            labelling.close()
        opened.append(Labelling(items(n), task or Rank(), files.folder, **settings))
        return opened[-1]

    yield start
    for labelling in opened:
        labelling.close()


def go_on(labelling, who, verdict=None, steps=1):
    """Judge what is shown; returns the items."""
    seen, verdict = [], verdict or [1, 2, 3]
    for _ in range(steps):
        item = labelling.state(who)["item"]
        seen.append((item["id"], item["again"]))
        labelling.judge(who, item["id"], item["again"], verdict, seconds=10)
    return seen


def test_a_judgement_is_on_disk_when_the_next_item_shows(open_, files):
    labelling = open_()
    first = labelling.state("ann")["item"]
    after = labelling.judge("ann", first["id"], False, [2, 1, 2], note=" close ", seconds=12.34)
    [record] = files.read(files.folder / "labels-0.jsonl")
    best = record["responses"][record["ranks"].index(1)]
    assert best == first["answers"][1] and sorted(record["ranks"]) == [1, 2, 2]
    assert [record["responses"][i] for i in record["shown"]] == first["answers"]
    assert (record["annotator"], record["note"], record["seconds"], record["turn"]) == ("ann", "close", 12.3, 1)
    assert after["item"]["id"] != first["id"] and (after["done"], after["total"]) == (1, 4)
    assert after["per_hour"] == pytest.approx(3600 / 12.3)
    with pytest.raises(ValueError, match="seconds=nan: a number was expected"):
        labelling.judge("ann", after["item"]["id"], False, [1, 2, 3], seconds=float("nan"))


def test_a_server_that_starts_again_goes_on_where_it_was(open_, files):
    before = open_(6)
    go_on(before, "ann", steps=2)
    before.skip("ann", before.state("ann")["item"]["id"], False)
    expected = before.state("ann")
    again = open_(6).state("ann")
    assert again == expected
    assert len(files.read(files.folder / "labels-0.jsonl")) == 2


def test_a_half_written_line_is_cut_off_and_its_item_comes_again(open_, files):
    labelling = open_()
    go_on(labelling, "ann", steps=2)
    path = files.folder / "labels-0.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])  # killed while it wrote the second
    again = open_()
    assert again.state("ann")["done"] == 1
    go_on(again, "ann")
    assert [r["turn"] for r in files.read(path)] == [1, 2]
    assert [r["item"] for r in files.read(path)] == [json.loads(line)["item"] for line in whole.splitlines()]


def test_the_same_judgement_sent_twice_counts_once(open_, files):
    labelling = open_()
    item = labelling.state("ann")["item"]["id"]
    first = labelling.judge("ann", item, False, [1, 2, 3])
    assert labelling.judge("ann", item, False, [1, 2, 3]) == first  # the answer to the first was lost on its way
    assert labelling.judge("ann", item, False, [3, 2, 1])["message"] == (
        "That one was done in another window; here is the next"
    )
    labelling.skip("ann", item, False)
    [record] = files.read(files.folder / "labels-0.jsonl")
    assert [record["ranks"][i] for i in record["shown"]] == [1, 2, 3]
    assert not files.read(files.folder / "aside-labels-0.jsonl")


def test_everyone_has_an_order_of_their_own(open_):
    labelling = open_(30, repeat=0.0)
    ann, bob = go_on(labelling, "ann", steps=30), go_on(labelling, "bob", steps=30)
    assert ann != bob and sorted(ann) == sorted(bob)
    records = labelling.records
    assert len(records) == 60
    shown = [tuple(r["shown"]) for r in records]
    assert len(set(shown)) == 6  # all orders of three answers
    by = {(r["annotator"], r["item"]): r["shown"] for r in records}
    assert sum(by["ann", i] != by["bob", i] for i, _ in ann) > 15
    assert labelling.state("ann")["item"] is None


def test_two_people_at_once_lose_and_double_nothing(open_, files):
    labelling = open_(20, repeat=0.0)
    threads = [threading.Thread(target=go_on, args=(labelling, who), kwargs={"steps": 20}) for who in ("ann", "bob")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = files.read(files.folder / "labels-0.jsonl")
    assert len(records) == len({(r["annotator"], r["item"]) for r in records}) == 40
    for who in ("ann", "bob"):
        assert [r["turn"] for r in records if r["annotator"] == who] == list(range(1, 21))


def test_people_share_the_items_where_one_judgement_each_is_enough(open_):
    labelling = open_(7, people_per_item=1)
    assert labelling.state("ann")["item"]["id"] != labelling.state("bob")["item"]["id"]
    while labelling.state("ann")["item"]:
        go_on(labelling, "ann")
        if labelling.state("bob")["item"]:
            go_on(labelling, "bob")
    assert labelling.state("bob")["item"] is None
    assert len(labelling.records) == len({r["item"] for r in labelling.records}) == 7


def test_undo_takes_the_last_step_back_and_shows_what_was_said(open_, files):
    labelling = open_(5)
    go_on(labelling, "ann", steps=2)
    go_on(labelling, "bob")
    item = labelling.state("ann")["item"]["id"]
    labelling.judge("ann", item, False, [3, 1, 2], note="hm")
    labelling.undo("ann", 3)
    labelling = open_(5)  # what was taken back is known to a new server too
    state = labelling.state("ann")
    assert state["item"]["id"] == item and state["item"]["before"] == {"verdict": [3, 1, 2], "note": "hm"}
    assert [(r["annotator"], r["turn"]) for r in files.read(files.folder / "labels-0.jsonl")] == [
        ("ann", 1), ("ann", 2), ("bob", 1),
    ]  # fmt: skip
    assert labelling.undo("ann", 3)["done"] == 2  # sent a second time: step 3 is gone already
    labelling.undo("ann", 2)
    assert labelling.undo("ann", 1)["done"] == 0
    assert labelling.undo("ann", 0)["message"] == "There is nothing to undo"
    go_on(labelling, "ann", steps=5)
    assert len(files.read(files.folder / "labels-0.jsonl")) == 6


def test_undo_brings_a_skipped_item_back(open_, files):
    labelling = open_()
    item = labelling.state("ann")["item"]["id"]
    skipped = labelling.skip("ann", item, False, note="cannot tell")
    assert (skipped["skipped"], skipped["judged"], skipped["done"]) == (1, 0, 1) and skipped["item"]["id"] != item
    assert not (files.folder / "labels-0.jsonl").exists()
    back = labelling.undo("ann", 1)
    assert back["item"]["id"] == item and back["item"]["before"] is None and back["skipped"] == 0


def test_a_share_of_the_items_comes_again_later_in_another_order(open_, files):
    labelling = open_(20, repeat=0.1)
    seen = go_on(labelling, "ann", steps=22)
    assert labelling.state("ann")["item"] is None
    assert [again for _, again in seen].count(True) == 2
    for place, (item, again) in enumerate(seen):
        if again:
            assert place - seen.index((item, False)) > REPEAT_AFTER
    assert len(files.read(files.folder / "labels-0.jsonl")) == 20  # the second judgements are no records to train on
    second = [r for r in files.read(files.folder / "aside-labels-0.jsonl") if r["aside"] == "repeated"]
    first = {r["item"]: r for r in files.read(files.folder / "labels-0.jsonl")}
    assert [r["item"] for r in second] == [item for item, again in seen if again]
    state = labelling.state("ann")
    assert state["compared"] == 6  # two items of three pairs
    alike = 0
    for r in second:
        for i, j in ((0, 1), (0, 2), (1, 2)):
            a, b = first[r["item"]]["ranks"], r["ranks"]
            alike += (a[i] < a[j]) == (b[i] < b[j])
    assert state["agreed"] == alike


def test_a_repeated_item_can_be_undone_and_done_again(open_):
    labelling = open_(10, repeat=0.1)
    go_on(labelling, "ann", steps=REPEAT_AFTER + 1)
    item = labelling.state("ann")["item"]
    assert item["again"]
    labelling.judge("ann", item["id"], True, [1, 1, 1])
    back = labelling.undo("ann", REPEAT_AFTER + 2)["item"]
    assert back == {**item, "before": {"verdict": [1, 1, 1], "note": ""}}
    assert labelling.judge("ann", item["id"], True, [1, 2, 3])["compared"] == 3
    with pytest.raises(ValueError, match="not judged a first time"):
        labelling.judge("bob", item["id"], True, [1, 2, 3])
    with pytest.raises(ValueError, match="not judged a first time"):
        labelling.skip("bob", item["id"], True)


def test_items_that_are_added_do_not_move_the_old_ones(open_):
    before = open_(5)
    first = go_on(before, "ann", steps=2)
    rest = [i for i in before._order("ann") if (i, False) not in first]
    after = open_(9)
    assert after.state("ann")["total"] == 9
    assert [i for i in after._order("ann") if i in rest] == rest
    with pytest.raises(ValueError, match="no longer among those to judge"):
        open_(5).judge("ann", items(9)[8].id, False, [1, 2, 3])


def test_equal_items_count_once(open_, files):
    labelling = Labelling([*items(2), *items(2)], Rank(), files.folder)
    assert labelling.state("ann")["total"] == 2
    labelling.close()


def test_names_are_one_persons_however_typed_and_must_be_names(open_):
    labelling = open_()
    go_on(labelling, "  Jos\u00e9 ")
    assert labelling.state("Jose\u0301")["judged"] == 1  # the accent as a character of its own
    for wrong in ("", " ", "x" * 61, "a\u0000b"):
        with pytest.raises(ValueError, match="a name of"):
            labelling.state(wrong)


def test_text_that_cannot_be_written_is_refused_and_nothing_is_kept(open_, files):
    labelling = open_(2, Write(True))
    item = labelling.state("ann")["item"]["id"]
    with pytest.raises(ValueError):
        labelling.judge("ann", item, False, "half of \ud83d")
    with pytest.raises(ValueError):
        labelling.judge("ann", item, False, "fine", note="\ud83d")
    assert labelling.state("ann")["turn"] == 0
    long = "\u05e9\u05dc\u05d5\u05dd \U0001f600 \u2028" * 20_000
    labelling.judge("ann", item, False, long)
    assert open_(2, Write(True)).records[0]["response"] == long.strip()


def test_a_second_server_on_the_same_files_is_refused(open_, files):
    open_()
    with pytest.raises(UserError, match="another labelling page writes there already"):
        Labelling(items(2), Rank(), files.folder)
    Labelling(items(2), Rank(), files.folder, round=1).close()
    Labelling(items(2), Rate(2), files.folder).close()


def test_a_line_that_is_no_record_is_named(open_, files):
    labelling = open_()
    go_on(labelling, "ann")
    path = files.folder / "labels-0.jsonl"
    with path.open("a") as file:
        file.write('{"prompt": \n')
    with pytest.raises(UserError, match=r"labels-0.jsonl:2: damaged \(not a record: not JSON \(Expecting value"):
        open_()
    path.write_text(path.read_text().splitlines()[0] + "\n")
    open_()  # the refusal did not keep the files


def test_the_page_and_chat_write_into_one_file_in_any_order(open_, files):
    path = files.folder / "labels-0.jsonl"
    chat = Judgements(files.folder, annotator="ann")
    said = {"prompt": "q0", "responses": ["x", "y"], "ranks": [2, 1], "models": ["a", "b"]}
    chat.ranking(said)  # before the page is there
    labelling = open_()
    assert labelling.state("ann")["done"] == 0
    go_on(labelling, "ann", steps=2)
    chat.ranking({**said, "ranks": [1, 1]})  # while it is there
    with path.open("a") as file:
        file.write('{"prompt":  "by hand", "responses": ["1", "2"], "ranks": [1, 2]}')  # and no end of the line
    foreign = [line for line in path.read_text().splitlines() if "shown" not in line]
    go_on(labelling, "ann")
    labelling.undo("ann", 3)
    labelling.undo("ann", 2)
    again = open_()
    assert again.state("ann")["done"] == 1
    go_on(again, "ann", steps=3)
    chat.ranking(said)
    lines = path.read_text().splitlines()
    assert [line for line in lines if "shown" not in line] == [*foreign, lines[0]]
    own = [json.loads(line) for line in lines if "shown" in line]
    assert len(own) == len({r["item"] for r in own}) == 4 and [r["turn"] for r in own] == [1, 2, 3, 4]
    assert len(load_records(path, parse_ranking).records) == 8


def test_the_page_and_chat_write_at_the_same_time(open_, files):
    labelling = open_(30, Rate(2))
    chat = Judgements(files.folder, annotator="bob")

    def thumbs():
        for i in range(30):
            kept = chat.feedback({"prompt": "p", "response": f"r{i} {'long ' * 3000}", "rating": 1})
            if i % 3 == 0:
                chat.take_back(kept)

    thread = threading.Thread(target=thumbs)
    thread.start()
    for turn in range(1, 31):
        go_on(labelling, "ann", verdict=1)
        if turn % 3 == 0:
            labelling.undo("ann", turn)
            go_on(labelling, "ann", verdict=-1)
    thread.join()
    rows = files.read(files.folder / "feedback-0.jsonl")
    assert sorted(r["turn"] for r in rows if r["annotator"] == "ann") == list(range(1, 31))
    assert [r["response"].split()[0] for r in rows if r["annotator"] == "bob"] == [f"r{i}" for i in range(30) if i % 3]
