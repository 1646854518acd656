"""Label Studio: what goes out, and what comes back."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.text.label_studio import rankings_of_task, tasks, template
from lit_rlhf.text.records import load_records, parse_ranking

MESSAGES = [{"role": "user", "content": "Which way? 👉"}]
TEXTS = ["left", "שלום עולם 🙂", "x" * 100_000]


def pairwise(selected=None, number=1, who=1, at="2024-01-01", **more):
    result = [] if selected is None else [{"type": "pairwise", "from_name": "comparison", "to_name": "comparison",
                                           "value": {"selected": selected}}]  # fmt: skip
    return {"id": number, "completed_by": who, "updated_at": at, "was_cancelled": False, "result": result, **more}


def ranker(value, **more):
    return pairwise(**more) | {"result": [{"type": "ranker", "from_name": "rank", "to_name": "answers",
                                           "value": {"ranker": value}}]}  # fmt: skip


def pair_task(*annotations):
    return {"id": 7, "data": {"prompt": "q", "answer1": "a", "answer2": "b"}, "annotations": list(annotations)}


def ranking_task(*annotations):
    task = tasks([{"prompt": MESSAGES, "responses": TEXTS}], "ranking")[0]
    return {"id": 8, **task, "annotations": list(annotations)}


def ranks(task):
    return [(r["annotator"], r["ranks"]) for r in rankings_of_task(task)]


def test_the_real_export(test_data):
    rankings = load_records(test_data / "label-studio" / "pairwise-export.json", parse_ranking).records
    assert len(rankings) == 24
    assert sum(r.ranks == [1, 2] for r in rankings) == 14  # as many as "selected": "left" stands in the file
    assert {r.annotator for r in rankings} == {"label_studio:2"}
    assert rankings[0].prompt[0]["content"] == "What is the latest news on the stock market?"
    assert rankings[0].responses[1].startswith("Here are 5 things")
    with pytest.raises(UserError, match="no field 'responses'"):  # the tasks are no export
        load_records(test_data / "label-studio" / "pairwise-tasks.json", parse_ranking)


def test_several_people_edits_and_skips():
    task = pair_task(
        pairwise("left", 1, who=1, at="2024-01-02"),
        pairwise("right", 2, who=1, at="2024-01-03"),  # the same person again: this counts
        pairwise("right", 3, who=2, at="2024-01-02"),
        pairwise("left", 4, who=2, at="2024-01-01"),  # older than the one before it
        pairwise("left", 5, who=3, was_cancelled=True),
        pairwise(None, 6, who=4),  # submitted without a choice
        pairwise("left", 7, who={"id": 9, "email": "ann@example.org"}),
    )
    assert dict(ranks(task)) == {"label_studio:1": [2, 1], "label_studio:2": [2, 1], "ann@example.org": [1, 2]}


def test_somebody_who_judged_and_then_skipped_says_nothing():
    task = pair_task(pairwise("left", 1, at="2024-01-01"), pairwise("left", 2, at="2024-01-02", was_cancelled=True))
    assert rankings_of_task(task) == []


def test_ties():
    tie = {"type": "choices", "from_name": "tie", "to_name": "dialogue", "value": {"choices": ["equally good"]}}
    assert ranks(pair_task(pairwise() | {"result": [tie]})) == [("label_studio:1", [1, 1])]
    assert ranks(ranking_task(ranker({"1": ["answer2", "answer1"], "2": [], "3": ["answer3"]})))[0][1] == [1, 1, 3]


@pytest.mark.parametrize("value", [
    ["answer3", "answer1", "answer2"], {"rank": ["answer3", "answer1", "answer2"]},
    {"1": ["answer3"], "2": ["answer1"], "3": ["answer2"]},
])  # fmt: skip
def test_rankings_with_and_without_buckets(value):
    task = ranking_task(ranker(value))
    bodies = {item["id"]: item["body"] for item in task["data"]["items"]}
    [record] = rankings_of_task(task)
    assert dict(zip(record["responses"], record["ranks"])) == {
        bodies["answer3"]: 1, bodies["answer1"]: 2, bodies["answer2"]: 3,
    }  # fmt: skip
    assert sorted(record["responses"]) == sorted(TEXTS) and record["prompt"] == MESSAGES


def test_what_was_left_in_the_list_is_not_judged():
    [record] = rankings_of_task(ranking_task(ranker({"_": ["answer1"], "1": ["answer3"], "2": ["answer2"]})))
    assert record["ranks"] == [1, 2]
    assert rankings_of_task(ranking_task(ranker({"_": ["answer1", "answer2"], "1": ["answer3"]}))) == []
    assert rankings_of_task(ranking_task(ranker({"_": ["answer1", "answer2", "answer3"], "1": [], "2": []}))) == []


def export(tmp_path, *rows):
    path = tmp_path / "export.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ({"result": [{"type": "choices", "from_name": "sentiment", "value": {"choices": ["good"]}}]}, "type 'choices'"),
        ({"result": [{"type": "rectanglelabels", "value": {}}]}, "'rectanglelabels'; this project was set up for some"),
        ({"result": [{"type": "pairwise", "value": {"selected": "up"}}]}, "'selected' is 'up'; 'left' or 'right' was"),
        ({"result": [{"type": "ranker", "value": {"ranker": {"1": ["answer1"]}}}]}, "'items' with 'id' and 'body'"),
    ],
)
def test_other_projects_are_refused_in_one_line(tmp_path, annotation, message):
    path = export(tmp_path, pair_task({"id": 1, "completed_by": 1, **annotation}))
    with pytest.raises(UserError) as error:
        load_records(path, parse_ranking)
    assert str(error.value).startswith(f"{path}: task 7: ") and message in str(error.value)
    assert len(load_records(export(tmp_path, pair_task({"id": 1, **annotation}), pair_task(pairwise("left"))),
                            parse_ranking, "skip").skipped) == 1  # fmt: skip


def test_buckets_that_are_no_ranks_and_items_that_are_not_there():
    with pytest.raises(ValueError, match="buckets are named good, bad; 1, 2, 3"):
        rankings_of_task(ranking_task(ranker({"good": ["answer1"], "bad": ["answer2"]})))
    with pytest.raises(ValueError, match="ranks 'answer9', which is none of its items"):
        rankings_of_task(ranking_task(ranker(["answer1", "answer9"])))
    with pytest.raises(ValueError, match="its data has the fields prompt, text; 'prompt', 'answer1' and 'answer2'"):
        rankings_of_task({"data": {"prompt": "q", "text": "t"}, "annotations": [pairwise("left")]})


def test_an_export_in_which_nothing_is_judged(tmp_path):
    path = export(tmp_path, pair_task(), pair_task(pairwise("left", was_cancelled=True)))
    with pytest.raises(UserError, match="2 tasks, and none is judged"):
        load_records(path, parse_ranking)


def test_files_that_are_no_export_in_the_format_json(tmp_path):
    min_ = {"id": 1, "prompt": "q", "comparison": "left", "annotator": 1, "annotation_id": 2, "lead_time": 3.5}
    for rows in ([min_], tasks([{"prompt": MESSAGES, "responses": TEXTS}], "pairwise")):
        with pytest.raises(UserError, match="or an export of another format; export the project"):
            load_records(export(tmp_path, *rows), parse_ranking)


def test_tasks_and_templates():
    answers = [{"prompt": MESSAGES, "responses": TEXTS, "models": ["sft", "base", "sft"]}]
    pairs = tasks(answers, "pairwise")
    assert len(pairs) == 3  # C(3, 2)
    assert {frozenset((t["data"]["answer1"], t["data"]["answer2"])) for t in pairs} == {
        frozenset((a, b)) for i, a in enumerate(TEXTS) for b in TEXTS[:i]
    }
    assert "sft" not in json.dumps(pairs + tasks(answers, "ranking"))  # who wrote what is not shown
    assert tasks(answers, "pairwise") == pairs
    many = [{"prompt": [{"role": "user", "content": str(i)}], "responses": ["first", "second"]} for i in range(40)]
    first = [t["data"]["answer1"] for t in tasks(many, "pairwise")]
    assert 8 < first.count("first") < 32  # shuffled: the place says nothing of the model
    for kind, tag in (("pairwise", "Pairwise"), ("ranking", "Ranker")):
        tree = ElementTree.fromstring(template(kind, 3))
        assert tree.find(f".//{tag}") is not None
        values = {e.get("value")[1:] for e in tree.iter() if (e.get("value") or "").startswith("$")}
        assert values <= set(tasks(answers, kind)[0]["data"])  # every field that it shows is there
    assert [b.get("name") for b in ElementTree.fromstring(template("ranking", 3)).iter("Bucket")] == ["1", "2", "3"]
