"""The labelling page as one object: read the records, open the port, serve until Ctrl-C."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from lit_rlhf.apps.label.modes import Item, Rank, Rate, Task, Write
from lit_rlhf.apps.label.queue import Labelling
from lit_rlhf.errors import UserError
from lit_rlhf.files import read_yaml
from lit_rlhf.stages.preference import STAGE as PREFERENCE
from lit_rlhf.stages.stage import all_stages
from lit_rlhf.text.records import OnBadRecord, load_records

INSTRUCTIONS = Path(__file__).parent / "instructions.txt"


@dataclass
class LabellingPage:
    """Serves a file of records to people who judge them, and writes what they say as records to train on.

    Args:
        path: answers to rank or rate, prompts or demonstrations to write; any record file.
        folder: where the judgements are written.
        mode: rank K answers, rate one answer, or write the ideal one.
        round: part of the names of the files that are written.
        instructions: text file that is shown beside the answers; None: to be helpful, truthful and harmless.
        repeat: share of the items that are shown to a person twice, to see whether they agree with themselves.
        people_per_item: an item is done when so many people have judged it; None: everyone judges everything.
        scale: ratings of ``rate``: 2 are thumbs (-1, 1), n are numbers from 1 (worst) to n.
        drafts: ``write`` begins from the record's answer where it has one.
        seed: of the order of items and answers.
        host: address to listen on.
        port: 0 takes a free one.
        token: whether only those who have the printed address get in (``LIT_RLHF_TOKEN`` gives one that stays).
        names: how the command that trains on the judgements names the run; the page shows it when all is judged.
        on_bad_record: whether a bad record ends the command or is left out.
        fields: our name of a field -> its name in the file ("a.b": ``b`` inside ``a``), where it has others.
    """

    path: str | Path
    folder: str | Path
    _: KW_ONLY
    mode: Literal["rank", "rate", "write"] = "rank"
    round: Annotated[int, Field(ge=0)] = 0
    instructions: str | Path | None = None
    repeat: Annotated[float, Field(ge=0, le=1)] = 0.1
    people_per_item: Annotated[int, Field(ge=1)] | None = None
    scale: Annotated[int, Field(ge=2, le=9)] = 2
    drafts: bool = True
    seed: int = 0
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 7860
    token: bool = False
    names: str = "run=..."
    on_bad_record: OnBadRecord = "fail"
    fields: dict[str, str] | None = None

    def __post_init__(self) -> None:
        self.path, self.folder = Path(self.path), Path(self.folder)
        tasks: dict[str, Task] = {"rank": Rank(), "rate": Rate(self.scale), "write": Write(self.drafts)}
        self.task = tasks[self.mode]

    def launch(self) -> None:
        """Serve until Ctrl-C. Raises ``UserError`` where the records, the files or the port cannot be had."""
        try:
            from lit_rlhf.apps.label.web import make_app
            from lit_rlhf.apps.server import Guard, PageServer
        except ImportError as error:
            raise UserError(f"the page needs {error.name}; pip install 'lit-rlhf[ui]' brings it") from None
        about = self.about()
        labelling = self.labelling()
        try:
            server = PageServer("label", self.host, self.port, self.token)
            print(
                f"label: {len(labelling.items):,} to {self.task.mode} at {server.address}; judgements go to "
                f"{labelling.judged.path}; Ctrl-C ends",
                flush=True,
            )
            server.serve(Guard(make_app(labelling, about), server))
        finally:
            labelling.close()
        print(f"label: {len(labelling.records):,} records in {labelling.judged.path}; to go on: {about['next']}")

    def labelling(self) -> Labelling:
        """The items with their queues and files."""
        return Labelling(
            self.items(),
            self.task,
            self.folder,
            round=self.round,
            seed=self.seed,
            repeat=self.repeat,
            people_per_item=self.people_per_item,
        )

    def items(self) -> list[Item]:
        """The items to judge."""
        if self.path.name == f"answers-{self.round}.jsonl" and not self.path.exists():
            raise UserError(
                f"label.path={self.path}: there are no collected answers yet. Run stage=preference "
                "preference/annotator=none first, or give records of your own as label.path="
            )
        loaded = load_records(self.path, self.task.items, self.on_bad_record, self.fields)
        if loaded.skipped:
            print(f"label: {len(loaded.skipped)} records were skipped as invalid, the first: {loaded.skipped[0]}")
        return [item for items in loaded.records for item in items]

    def about(self) -> dict[str, Any]:
        """Texts of the page that are the same for everyone."""
        instructions = INSTRUCTIONS if self.instructions is None else Path(self.instructions)
        if not instructions.is_file():
            raise UserError(f"label.instructions={instructions}: no such file; give a text file, or null")
        records = self.folder / f"{self.task.file}-{self.round}.jsonl"
        stage = next(name for name, known in all_stages().items() if self.task.mode in known.learns_from)
        data = f"{stage}.data.path={records}"
        if self.task.mode == "rate":  # what was said of single answers stands beside rankings, or alone
            data = f"{stage}.data.path=null {stage}.data.feedback={records}"
        begun = self.folder.parent / PREFERENCE.name
        asked = (read_yaml(begun / "config.yaml").get(PREFERENCE.name) or {}).get("annotator")
        waits = self.path.parent == self.folder and asked is not None and not (begun / "done.json").exists()
        return {
            "mode": self.task.mode,
            "ratings": self.task.ratings if isinstance(self.task, Rate) else [],
            "instructions": instructions.read_text(encoding="utf-8"),
            "records": str(records),
            "next": "the command that collected the answers, once more: it waits for these rankings"
            if waits and self.mode == "rank"
            else f"lit-rlhf {self.names} stage={stage} {stage}/data=jsonl {data}",
        }
