"""Label Studio: tasks and the labelling template out, pairwise and ranking exports (JSON) in.

A task carries prompt and answers, so an export stands for itself. Which model wrote an answer is not in it: the data
manager would show it to those who judge."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any, Literal

Kind = Literal["ranking", "pairwise"]

TEMPLATES = Path(__file__).parent / "templates"


def tasks(answers: Sequence[dict[str, Any]], kind: Kind) -> list[dict[str, Any]]:
    """Tasks to import, of records with ``prompt`` (messages) and ``responses``.

    "ranking": one per prompt; "pairwise": one for each two answers. The answers' order is shuffled, by the prompt
    alone, so that it says nothing of the models."""
    made = []
    for record in answers:
        order = list(record["responses"])
        Random(json.dumps(record["prompt"])).shuffle(order)
        spoken = "\n\n".join(message["content"] for message in record["prompt"])
        shared = {"prompt": spoken, "messages": record["prompt"]}
        if kind == "ranking":
            items = [{"id": f"answer{i}", "title": f"Answer {i}", "body": text} for i, text in enumerate(order, 1)]
            made.append({"data": {**shared, "items": items}})
        else:
            made += [{"data": {**shared, "answer1": a, "answer2": b}} for a, b in combinations(order, 2)]
    return made


def template(kind: Kind, places: int = 4) -> str:
    """The labelling template (XML); ``places`` is the largest number of answers to a prompt."""
    layout = (TEMPLATES / f"label_studio_{kind}.xml").read_text(encoding="utf-8")
    buckets = "\n    ".join(f'<Bucket name="{i}" title="{i}"/>' for i in range(1, places + 1))
    return layout.replace("<!-- buckets -->", buckets)


def is_task(row: Any) -> bool:
    """Whether a row of a JSON file is a task of a Label Studio export."""
    return isinstance(row, dict) and isinstance(row.get("data"), dict) and isinstance(row.get("annotations"), list)


def is_other_format(row: Any) -> bool:
    """Whether a row is of a file of tasks, or of an export in another format (JSON-MIN)."""
    if not isinstance(row, dict):
        return False
    return {"annotation_id", "lead_time"} <= row.keys() or row.keys() <= {"id", "data", "meta", "predictions"}


def rankings_of_task(task: dict[str, Any]) -> list[dict[str, Any]]:
    """A ranking record for each person who judged the task; of several annotations by one person the last counts.

    Skipped (cancelled) and unsubmitted ones say nothing. Raises ``ValueError`` where the annotation is not one of a
    pairwise or ranking project."""
    last: dict[str, dict[str, Any]] = {}
    for annotation in sorted(task["annotations"], key=_moment):
        last[_person(annotation)] = annotation
    rankings = []
    for person, annotation in last.items():
        if not annotation.get("was_cancelled"):
            judged = _judgement(task, annotation.get("result") or [])
            if judged is not None:
                responses, ranks = judged
                rankings.append({"prompt": _prompt(task), "responses": responses, "ranks": ranks, "annotator": person})
    return rankings


def _judgement(task: dict[str, Any], results: list[dict[str, Any]]) -> tuple[list[str], list[int]] | None:
    """(responses, ranks) of one annotation; None where nothing was chosen."""
    kinds = {result.get("type") for result in results}
    if "pairwise" in kinds:
        result = next(r for r in results if r["type"] == "pairwise")
        return _pair(task, result, tie="choices" in kinds)
    if "ranker" in kinds:
        return _ranked(task, next(r for r in results if r["type"] == "ranker"))
    if kinds == {"choices"} and all(r.get("from_name") == "tie" for r in results):
        return _pair(task, {}, tie=True)
    if not kinds - {"textarea"}:  # a comment alone
        return None
    raise ValueError(
        f"an annotation of type {', '.join(sorted(map(repr, kinds)))}; this project was set up for something else than "
        "comparing answers. A project with a Pairwise or Ranker tag was expected: stage=preference "
        "preference/annotator=label_studio writes a template for one"
    )


def _pair(task: dict[str, Any], result: dict[str, Any], tie: bool) -> tuple[list[str], list[int]]:
    data, names = task["data"], result.get("to_name")
    left, right = "answer1", "answer2"
    if isinstance(names, list) and len(names) == 2 and all(isinstance(data.get(name), str) for name in names):
        left, right = names
    answers = [data.get(left), data.get(right)]
    if not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"its data has the fields {', '.join(data)}; 'prompt', 'answer1' and 'answer2' were expected")
    if tie:
        return answers, [1, 1]
    selected = result.get("value", {}).get("selected")
    if selected not in ("left", "right"):
        raise ValueError(f"'selected' is {selected!r}; 'left' or 'right' was expected")
    return answers, [1, 2] if selected == "left" else [2, 1]


def _ranked(task: dict[str, Any], result: dict[str, Any]) -> tuple[list[str], list[int]] | None:
    texts: dict[Any, Any] = {item["id"]: item.get("body", item.get("title")) for item in _items(task)}
    value = result.get("value", {}).get("ranker")
    groups = {"order": value} if isinstance(value, list) else {k: v for k, v in (value or {}).items() if v}
    # What was left in the list beside the buckets was not judged.
    places = {k: v for k, v in groups.items() if k != "_" or len(groups) == 1}
    if all(name.isdecimal() for name in places):
        ranked = {i: int(name) for name, ids in places.items() for i in ids}
    elif len(places) == 1:  # no buckets: the list itself was put into order
        ranked = {i: rank for rank, i in enumerate(next(iter(places.values())), start=1)}
    else:
        raise ValueError(f"its buckets are named {', '.join(places)}; 1, 2, 3 ... were expected (1 = best)")
    if "_" in places and len(groups) == 1 and any(b.isdecimal() for b in value):
        return None  # there are buckets, and nothing was put into them
    if unknown := [i for i in ranked if not isinstance(texts.get(i), str)]:
        raise ValueError(f"it ranks {unknown[0]!r}, which is none of its items ({', '.join(map(str, texts))})")
    return ([texts[i] for i in ranked], list(ranked.values())) if len(ranked) > 1 else None


def _items(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    lists = [v for v in task["data"].values() if isinstance(v, list) and v and all(map(_is_item, v))]
    if not lists:
        has = ", ".join(task["data"])
        raise ValueError(f"its data has the fields {has}; 'items' with 'id' and 'body' was expected")
    yield from lists[0]


def _is_item(item: Any) -> bool:
    return isinstance(item, dict) and "id" in item and ("body" in item or "title" in item)


def _prompt(task: dict[str, Any]) -> Any:
    for name in ("messages", "prompt"):
        if task["data"].get(name):
            return task["data"][name]
    raise ValueError(f"its data has the fields {', '.join(task['data'])}; 'prompt' or 'messages' was expected")


def _person(annotation: dict[str, Any]) -> str:
    """Who judged: the address where the export has it, else the number that Label Studio gave this person."""
    who = annotation.get("completed_by")
    if isinstance(who, dict):
        who = who.get("email") or who.get("id")
    return who if isinstance(who, str) and "@" in who else f"label_studio:{who}"


def _moment(annotation: dict[str, Any]) -> tuple[str, int]:
    """When it was last changed; the number decides where nobody says."""
    when, number = annotation.get("updated_at") or annotation.get("created_at") or "", annotation.get("id")
    return str(when), number if isinstance(number, int) else 0
