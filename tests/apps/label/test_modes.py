"""Items from records, and records from judgements."""

import pytest

from lit_rlhf.apps.label import Item, Rank, Rate, Write
from lit_rlhf.text.records import parse_demonstration, parse_feedback, parse_ranking

ASKED = [{"role": "user", "content": "Why?"}]


def test_ranks_go_back_from_the_places_of_the_page_to_the_responses():
    item = Item(ASKED, ["a", "b", "c", "d"])
    # The page showed c, a, d, b and the person said: a best, then c and b alike, d last.
    record = Rank().record(item, [2, 0, 3, 1], [2, 1, 3, 2])
    assert record == {"prompt": ASKED, "responses": ["a", "b", "c", "d"], "ranks": [1, 2, 2, 3]}
    assert Rank().verdict({**record, "shown": [2, 0, 3, 1]}) == [2, 1, 3, 2]
    assert parse_ranking(record).ranks == [1, 2, 2, 3]


def test_ranks_have_no_gaps():
    assert Rank().record(Item(ASKED, ["a", "b", "c"]), [0, 1, 2], [7, 2, 7])["ranks"] == [2, 1, 2]


@pytest.mark.parametrize("verdict", [None, [], [1], [1, 2, 3], [0, 1], [1, "2"], [True, 2], [1.5, 1], "12"])
def test_what_is_no_ranking_is_refused(verdict):
    with pytest.raises(ValueError, match="rank"):
        Rank().record(Item(ASKED, ["a", "b"]), [0, 1], verdict)


def test_self_agreement_by_hand():
    first, second = {"ranks": [1, 2, 3]}, {"ranks": [1, 3, 2]}
    assert Rank().agreement(first, second) == (2, 3)  # only the pair of the last two is turned round
    assert Rank().agreement(first, {"ranks": [1, 1, 2]}) == (2, 3)  # a tie is not an order
    assert Rank().agreement({"ranks": [1, 1]}, {"ranks": [1, 1]}) == (1, 1)
    assert Rate(2).agreement({"rating": 1}, {"rating": -1}) == (0, 1)


def test_ranking_takes_answers_rankings_and_pairs_and_keeps_where_they_come_from():
    row = {
        "prompt": "Why?",
        "responses": ["a", "b"],
        "ranks": None,
        "model": "sft",
        "round": 2,
        "annotator": "x",
        "note": "y",
    }
    [item] = Rank().items(row)
    assert (item.prompt, item.responses, item.others) == (ASKED, ["a", "b"], {"model": "sft", "round": 2})
    assert Rank().items({**row, "ranks": [2, 1]})[0].id == item.id
    assert Rank().items({"prompt": "Why?", "chosen": "a", "rejected": "b"})[0].responses == ["a", "b"]
    with pytest.raises(ValueError, match="'responses' has 17 entries; the page takes up to 16"):
        Rank().items({"prompt": "Why?", "responses": [str(n) for n in range(17)]})
    with pytest.raises(ValueError, match="'responses' is 'ab'"):
        Rank().items({"prompt": "Why?", "responses": "ab"})


def test_answers_that_are_more_than_texts_are_refused():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    thought = {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    for row in ({"chosen": [call], "rejected": "a"}, {"chosen": "b", "rejected": [thought]}, {"completion": [call]}):
        with pytest.raises(ValueError, match="an answer has calls of tools or a thought"):
            Rate(2).items({"prompt": "Why?", **row})
    parts = [{**ASKED[0]}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
    assert Rate(2).items({"messages": parts})[0].responses == ["a"]


def test_rating_takes_each_response_with_what_was_said_of_it():
    row = {"prompt": "Why?", "responses": ["a", "b"], "finished": [True, False], "round": 1}
    first, second = Rate(2).items(row)
    assert (first.responses, first.others) == (["a"], {"finished": True, "round": 1})
    assert (second.responses, second.others) == (["b"], {"finished": False, "round": 1})
    assert Rate(2).items({"prompt": "Why?", "response": "a"})[0].id == first.id


def test_ratings_are_thumbs_or_numbers():
    item = Item(ASKED, ["a"])
    assert Rate(2).record(item, [0], -1) == {"prompt": ASKED, "response": "a", "rating": -1}
    assert Rate(5).record(item, [0], 5)["rating"] == 5
    for scale, wrong in ((2, 0), (2, True), (5, 6), (5, -1), (5, "3"), (5, None)):
        with pytest.raises(ValueError, match="a rating is one of"):
            Rate(scale).record(item, [0], wrong)


def test_writing_begins_from_the_best_answer_there_is():
    write = Write(drafts=True)
    assert write.items({"prompt": "Why?"})[0].responses == []
    assert write.items({"messages": ASKED})[0].responses == []
    assert write.items({"prompt": "Why?", "response": "So."})[0].responses == ["So."]
    assert write.items({"messages": [*ASKED, {"role": "assistant", "content": "So."}]})[0].responses == ["So."]
    assert write.items({"prompt": "Why?", "responses": ["a", "b"]})[0].responses == ["a"]
    assert write.items({"prompt": "Why?", "responses": ["a", "b"], "ranks": [2, 1]})[0].responses == ["b"]
    assert Write(drafts=False).items({"prompt": "Why?", "response": "So."})[0].responses == []


def test_what_was_written_is_a_demonstration():
    record = Write(True).record(Item(ASKED, []), [], " Because.\n\nReally. ")
    assert parse_demonstration(record).messages == [*ASKED, {"role": "assistant", "content": "Because.\n\nReally."}]
    for empty in ("", " \n", None):
        with pytest.raises(ValueError, match="the answer is empty"):
            Write(True).record(Item(ASKED, []), [], empty)


FORMS = [
    {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "b"}]},
    {"prompt": "Why?", "chosen": "b", "rejected": "a", "margin": 3, "score_chosen": 5, "score_rejected": 1},
    {"prompt": "Why?", "responses": ["a", "b"], "scores": [1, 5]},
    {"context": ASKED, "response1": "a", "response2": "b", "overall_preference": 2},
    {"instruction": "Why?", "completions": [{"response": r, "overall_score": ord(r)} for r in "ab"]},
    {"prompt": "Why?", "completion": "b", "label": True},
]


@pytest.mark.parametrize("row", FORMS, ids=lambda row: "-".join(row))
def test_what_a_person_says_stands_for_what_the_file_said(row):
    [draft] = Write(drafts=True).items(row)
    assert (draft.prompt, draft.responses) == (ASKED, ["b"])  # the better one
    wrote = {**draft.others, **Write(True).record(draft, [0], "mine")}
    assert parse_demonstration(wrote).messages == [*ASKED, {"role": "assistant", "content": "mine"}]
    rate = Rate(2)
    [*_, item] = rate.items({**row, "tools": [{"name": "x"}, {"name": "y"}]})
    found = parse_feedback({**item.others, **rate.record(item, [0], -1)})
    assert (found.rating, len(found.tools)) == (-1, 2)
    if len(rate.items(row)) == 2:
        [item] = Rank().items(row)
        ranking = parse_ranking({**item.others, **Rank().record(item, [0, 1], [1, 1])}, margin=True, score_margin=1.0)
        assert (ranking.ranks, ranking.margins) == ([1, 1], None)
