"""People as annotators: they are handed the answers, and what they say comes back in a file, later."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from lit_rlhf.errors import UserError
from lit_rlhf.files import write_text
from lit_rlhf.stages.preference.annotator_agreement import latest, majority
from lit_rlhf.text.label_studio import Kind, tasks, template
from lit_rlhf.text.records import Ranking, load_records, parse_ranking, prompt_key, text_of
from lit_rlhf.text.records.rankings import PER_ANSWER

Combine = Literal["all", "majority"]


@runtime_checkable
class People(Protocol):
    """Annotators who are not there while the answers are drawn."""

    combine: Combine

    def hand_out(self, answers: Sequence[dict[str, Any]], file: Path) -> str:
        """Put what they need beside ``file``, in which the answers are; returns what to do next."""
        ...

    def read(self) -> list[Ranking]:
        """Ranking records of what they have judged so far."""
        ...


def judgements(people: People) -> list[dict[str, Any]]:
    """Ranking records of what people have judged so far, the last word of each."""
    read = people.read()
    if whole := next((r for r in read if r.answers), None):
        raise UserError(
            f"{whole.place}: an answer has calls of tools or a thought, and people judge texts alone; give this file "
            "to the reward model itself (reward/data=jsonl)"
        )
    rows = [
        {
            "prompt": r.prompt,
            "responses": r.responses,
            "ranks": r.ranks,
            "annotator": r.annotator,
            **r.lineage,
            **({"tools": r.tools} if r.tools else {}),
        }
        for r in read
    ]
    return majority(rows) if people.combine == "majority" else latest(rows)


class Labels:
    """People whose rankings are in files of records: those that ``stage=label`` writes, or any others.

    Args:
        path: the file, or several.
        combine: "all" keeps each annotator's ranking as a record, "majority" makes one of them.
    """

    def __init__(self, path: str | Path | Sequence[str | Path], combine: Combine = "all") -> None:
        self.paths = [Path(p) for p in ([path] if isinstance(path, str | Path) else path)]
        self.combine: Combine = combine

    def hand_out(self, answers: Sequence[dict[str, Any]], file: Path) -> str:
        return f"Rank them with stage=label (the rest of the command as it is), which writes {self.paths[0]}"

    def read(self) -> list[Ranking]:
        there = [path for path in self.paths if path.exists() and path.stat().st_size > 0]
        if missing := [path for path in self.paths[1:] if path not in there]:
            raise UserError(f"path (preference.annotator): {missing[0]} is not there, or empty")
        return [record for path in there for record in load_records(path, parse_ranking).records]


class LabelStudio:
    """People in Label Studio.

    Args:
        export: the project's export, format JSON; None: there is none yet.
        kind: "ranking" shows all answers of a prompt together, "pairwise" two at a time, each pair once.
        combine: "all" keeps each annotator's ranking as a record, "majority" makes one of them.
    """

    def __init__(self, export: str | Path | None = None, kind: Kind = "ranking", combine: Combine = "all") -> None:
        self.export, self.kind = None if export is None else Path(export), kind
        self.combine: Combine = combine

    def hand_out(self, answers: Sequence[dict[str, Any]], file: Path) -> str:
        there = file.with_name(file.name.replace("answers", "label_studio_tasks")).with_suffix(".json")
        layout = file.with_name(file.name.replace("answers", "label_studio_template")).with_suffix(".xml")
        shown = [{**r, "prompt": [{"role": m["role"], "content": text_of(m)} for m in r["prompt"]]} for r in answers]
        write_text(there, json.dumps(tasks(shown, self.kind), ensure_ascii=False, indent=1) + "\n")
        write_text(layout, template(self.kind, max(len(r["responses"]) for r in answers)))
        return (
            f"In Label Studio make a project with the template {layout} and import {there}; when they are judged, "
            "export as JSON and add preference.annotator.export=<that file>"
        )

    def read(self) -> list[Ranking]:
        if self.export is None:
            return []
        if not self.export.is_file():
            raise UserError(f"export={self.export} (preference.annotator): no such file; export the project as JSON")
        return load_records(self.export, parse_ranking).records


def with_lineage(rankings: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rankings with what is known of each answer: who wrote it, at which temperature.

    People may have ranked some of a prompt's answers only, in another order, or answers from elsewhere."""
    known = {prompt_key(record["prompt"]): record for record in answers}
    return [_joined(ranking, known.get(prompt_key(ranking["prompt"]))) for ranking in rankings]


def _joined(ranking: dict[str, Any], record: dict[str, Any] | None) -> dict[str, Any]:
    if record is None or not set(ranking["responses"]) <= set(record["responses"]):
        return ranking
    places = [record["responses"].index(text) for text in ranking["responses"]]
    chosen = {name: [record[name][i] for i in places] for name in PER_ANSWER if name in record}
    shared = {k: v for k, v in record.items() if k not in ("responses", *PER_ANSWER)}
    return {**shared, **ranking, **chosen, "prompt": record["prompt"]}  # people were shown its text
