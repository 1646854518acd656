"""Records: the data formats of every stage, read from JSONL, JSON, CSV, Parquet, plain text or a Hub name.

A prompt is always kept as messages (one or several turns). Every bad record is named by file, line and reason."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from lit_rlhf.errors import UserError
from lit_rlhf.text.label_studio import is_other_format, is_task, rankings_of_task

Messages = list[dict[str, str]]  # [{"role": "system" | "user" | "assistant", "content": str}, ...]
OnBadRecord = Literal["fail", "skip"]
Record = TypeVar("Record")


@dataclass(frozen=True)
class Demonstration:
    """A dialogue to imitate; the assistant's turns from message ``context`` on are learned."""

    messages: Messages
    context: int


PER_ANSWER = ("models", "temperatures", "finished")  # lists with an entry for each response
LINEAGE = ("model", "round", "sampling", "kind", *PER_ANSWER)


@dataclass(frozen=True)
class Ranking:
    """K responses to one prompt and their ranks, 1 = best, ties allowed. A pair is a ranking of two."""

    prompt: Messages
    responses: list[str]
    ranks: list[int]
    annotator: str = ""
    lineage: dict[str, Any] = field(default_factory=dict)  # which model, round and sampling settings made the responses
    ratings: list[float] | None = None  # 0 (worst) to 1 (best), where the ranks come from feedback


@dataclass(frozen=True)
class Feedback:
    """What someone thought of one answer: a thumb (1 or -1), or a number on a scale of their own."""

    prompt: Messages
    response: str
    rating: float
    annotator: str = ""
    lineage: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LabelledText:
    """A text, or a premise and a hypothesis, and its label."""

    texts: tuple[str, ...]  # one or two, in this order
    label: str


@dataclass(frozen=True)
class MultipleChoice:
    """A question or a text that breaks off, and what may follow."""

    context: str
    choices: tuple[str, ...]
    answer: int  # index of the right choice, from 0


@dataclass(frozen=True)
class Similarity:
    """Two texts without an order, and how they are related."""

    text_a: str
    text_b: str
    label: str


@dataclass(frozen=True)
class OpenQuestion:
    """A question and the answers that count as right."""

    question: str
    answers: tuple[str, ...]


Labelled = LabelledText | MultipleChoice | Similarity
Task = Labelled | OpenQuestion


def parse_text(row: dict[str, Any]) -> str:
    """``text``."""
    return _text(row, "text")


def parse_prompt(row: dict[str, Any]) -> Messages:
    """``prompt`` (a string or messages) or ``messages``; a final assistant turn of ``messages`` is dropped."""
    if "messages" in row:
        messages = _messages(row["messages"], "messages")
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        return _prompt(messages, "messages")
    if "instruction" in row:
        return _instruction(row)
    return _prompt(_require(row, "prompt"), "prompt")


def parse_messages(row: dict[str, Any]) -> Messages:
    """``messages``, whoever has the last word."""
    return _messages(_require(row, "messages"), "messages")


class PromptRecord(NamedTuple):
    """A prompt, and the other fields of its record, which reward functions get to see."""

    messages: Messages
    others: dict[str, Any]


def parse_prompt_record(row: dict[str, Any]) -> PromptRecord:
    """:func:`parse_prompt`, with the fields that are not part of the prompt."""
    prompt = parse_prompt(row)
    used = ("instruction", "input") if "instruction" in row and "messages" not in row else ("prompt", "messages")
    return PromptRecord(prompt, {name: value for name, value in row.items() if name not in used})


def parse_demonstration(row: dict[str, Any]) -> Demonstration:
    """``prompt`` + ``response`` (or ``completion``), ``instruction`` [+ ``input``] + ``output``, or ``messages``.

    All assistant turns of ``messages`` are learned; of the others, the response."""
    if "messages" in row:
        messages = _messages(row["messages"], "messages")
        if messages[-1]["role"] != "assistant":
            raise ValueError("'messages' ends with a turn of the user; a demonstration ends with the assistant's")
        return Demonstration(messages, 0)
    prompt = parse_prompt(row)
    for name in ("response", "completion", "output"):
        if name in row:
            response = row[name]
            if isinstance(response, list):  # conversational completion, as in TRL
                response = _messages(response, name)[-1]["content"]
            if not isinstance(response, str) or not response.strip():
                raise ValueError(f"'{name}' is {_short(response)}; a non-empty string was expected")
            return Demonstration([*prompt, {"role": "assistant", "content": response}], len(prompt))
    raise ValueError(f"no 'response', 'completion' or 'output' among its fields ({', '.join(row)})")


def parse_ranking(row: dict[str, Any]) -> Ranking:
    """``prompt``, ``responses``, ``ranks``; or a pair: [``prompt``,] ``chosen``, ``rejected``.

    ``chosen`` and ``rejected`` are answers, messages (as in TRL), or whole transcripts (as in hh-rlhf). An empty
    response is an answer that says nothing, which models do; it may be ranked like others."""
    lineage = {key: row[key] for key in LINEAGE if key in row}
    annotator = str(row.get("annotator", ""))
    if "chosen" in row or "rejected" in row:
        prompt, responses = _pair(row)
        # Of two equal answers none is better: a tie, from which nothing is learned.
        return Ranking(prompt, responses, [1, 1] if responses[0] == responses[1] else [1, 2], annotator, lineage)
    responses, ranks = _require(row, "responses"), _require(row, "ranks")
    if not isinstance(responses, list) or len(responses) < 2 or not all(isinstance(r, str) for r in responses):
        raise ValueError(f"'responses' is {_short(responses)}; a list of two or more strings was expected")
    if not isinstance(ranks, list) or len(ranks) != len(responses):
        count = len(ranks) if isinstance(ranks, list) else 0
        raise ValueError(
            f"'ranks' has {count} entries for {len(responses)} responses. Give one rank a response (1 = best, ties "
            "allowed)"
        )
    if not all(isinstance(r, int) and not isinstance(r, bool) and r >= 1 for r in ranks):
        raise ValueError(f"'ranks' is {_short(ranks)}; whole numbers from 1 (best) up were expected")
    _check_equal(responses, ranks)
    for name in PER_ANSWER:
        if name in row and (not isinstance(row[name], list) or len(row[name]) != len(responses)):
            what = f"a list of {len(responses)}, one a response"
            raise ValueError(f"'{name}' is {_short(row[name])}; {what}, was expected")
    return Ranking(_prompt(_require(row, "prompt"), "prompt"), responses, ranks, annotator, lineage)


def parse_feedback(row: dict[str, Any]) -> Feedback:
    """``prompt``, ``response``, ``rating``: 1 or -1 for a thumb up or down, or a number."""
    rating = _require(row, "rating")
    try:
        value = float(rating)  # a CSV file has texts only
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(rating, bool) or not math.isfinite(value):
        raise ValueError(f"'rating' is {_short(rating)}; 1 or -1 for a thumb up or down, or a number, was expected")
    lineage = {key: row[key] for key in ("model", "round", "sampling", "kind") if key in row}
    return Feedback(parse_prompt(row), _text(row, "response"), value, str(row.get("annotator", "")), lineage)


def rankings_of_feedback(feedback: Sequence[Feedback]) -> list[Ranking]:
    """A ranking for each prompt: answers that were rated higher rank higher, equal ratings tie.

    Ratings between -1 and 1 are thumbs; others are measured between the lowest and the highest of them all. An answer
    that was rated several times counts with the mean. Raises ``UserError`` where all ratings are equal, but thumbs."""
    given = [f.rating for f in feedback]
    thumbs = all(-1 <= rating <= 1 for rating in given)
    low, high = (-1.0, 1.0) if thumbs else (min(given), max(given))
    if low == high:
        raise UserError(f"all {len(given)} ratings are {low:g}; nothing can be learned from answers that are all alike")
    prompts: dict[str, list[Feedback]] = {}
    for item in feedback:
        prompts.setdefault(prompt_key(item.prompt), []).append(item)
    return [_rated(items, low, high) for items in prompts.values()]


def _rated(items: list[Feedback], low: float, high: float) -> Ranking:
    by_answer: dict[str, list[float]] = {}
    for item in items:
        by_answer.setdefault(item.response, []).append((item.rating - low) / (high - low))
    ratings = [sum(values) / len(values) for values in by_answer.values()]
    order = sorted(ratings, reverse=True)
    annotators = sorted({item.annotator for item in items})
    return Ranking(
        items[0].prompt, list(by_answer), [order.index(r) + 1 for r in ratings], "+".join(annotators), items[0].lineage,
        ratings,
    )  # fmt: skip


def _check_equal(responses: list[str], ranks: list[int]) -> None:
    known: dict[str, int] = {}
    for i, (text, rank) in enumerate(zip(responses, ranks)):
        first = known.setdefault(text, i)
        if rank != ranks[first]:
            raise ValueError(
                f"responses {first + 1} and {i + 1} are the same text, {_short(text)}, with the ranks {ranks[first]} "
                f"and {rank}. Give equal answers one rank, or leave one out"
            )


def parse_labelled(row: dict[str, Any]) -> Labelled:
    """``text`` + ``label``, ``premise`` + ``hypothesis`` + ``label``, ``text_a`` + ``text_b`` + ``label``, or
    ``context`` (or ``prompt``) + ``choices`` + ``label``, which is an index from 0 or the right choice itself."""
    if "choices" in row:
        return _multiple_choice(row)
    if "text_a" in row or "text_b" in row:
        return Similarity(_text(row, "text_a"), _text(row, "text_b"), _label(row))
    names = ("premise", "hypothesis") if "premise" in row or "hypothesis" in row else ("text",)
    return LabelledText(tuple(_text(row, name) for name in names), _label(row))


def parse_task(row: dict[str, Any]) -> Task:
    """:func:`parse_labelled`; or ``prompt`` (a string) + ``answers``, ``response``, ``completion`` or ``output``, to be
    met word for word."""
    if "choices" in row or "label" in row:
        return parse_labelled(row)
    name = next((n for n in ("answers", "response", "completion", "output") if n in row), "answers")
    answers = _require(row, name)
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise ValueError(f"'{name}' is {_short(answers)}; a string, or a list of them, was expected")
    if "instruction" in row:
        return OpenQuestion(_instruction(row)[0]["content"], tuple(answers))
    return OpenQuestion(_text(row, "prompt"), tuple(answers))


def task_prompt(task: Task) -> Messages:
    """What the split by prompt looks at: the text, the premise, the first of two texts, or the question."""
    if isinstance(task, LabelledText):
        text = task.texts[0]
    elif isinstance(task, MultipleChoice):
        text = task.context
    else:
        text = task.text_a if isinstance(task, Similarity) else task.question
    return [{"role": "user", "content": text}]


def _multiple_choice(row: dict[str, Any]) -> MultipleChoice:
    choices, label = row["choices"], _require(row, "label")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ValueError(f"'choices' is {_short(choices)}; a list of two or more non-empty strings was expected")
    if len(set(choices)) < len(choices):
        raise ValueError(f"'choices' is {_short(choices)}; two of them are the same")
    if label in choices:
        label = choices.index(label)
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
        raise ValueError(
            f"'label' is {_short(label)}; the right choice, or its index from 0 to {len(choices) - 1}, was expected"
        )
    return MultipleChoice(_text(row, "context" if "context" in row else "prompt"), tuple(choices), label)


def _label(row: dict[str, Any]) -> str:
    label = _require(row, "label")
    if not isinstance(label, str | int) or not str(label).strip():
        raise ValueError(f"'label' is {_short(label)}; a name or a whole number was expected")
    return str(label)


@dataclass(frozen=True)
class Loaded(Generic[Record]):
    """The good records of a source, and a line for each one that was skipped."""

    records: list[Record]
    skipped: list[str]


def load_records(
    path: str | Path, parse: Callable[[dict[str, Any]], Record], on_bad_record: OnBadRecord = "fail"
) -> Loaded[Record]:
    """Read every record of ``path``: a .jsonl, .json, .csv, .parquet or .txt file, or a Hub data set's name.

    The text formats are read here rather than through ``datasets``, which cannot say on which line a record is bad;
    Parquet and the Hub go through it. Raises ``UserError`` naming file, line and reason, unless ``on_bad_record`` is
    "skip"; also when nothing valid is left."""
    skipped: list[str] = []
    return Loaded(list(read_records(path, parse, skipped, on_bad_record)), skipped)


def read_records(
    path: str | Path,
    parse: Callable[[dict[str, Any]], Record],
    skipped: list[str],
    on_bad_record: OnBadRecord = "fail",
) -> Iterator[Record]:
    """The records of :func:`load_records` one by one; ``skipped`` takes a line for each bad one.

    Lines of .jsonl and rows of .parquet are read as they are asked for: the file may be larger than memory."""
    valid = False
    for place, row in _rows(str(path)):
        try:
            if isinstance(row, Exception):
                raise row
            if not isinstance(row, dict):
                raise ValueError(f"{_short(row)} is not a record; an object with named fields was expected")
            record = parse(row)
        except ValueError as error:
            if on_bad_record == "fail":
                raise UserError(f"{place}: {error}. Mend it, or set on_bad_record=skip.") from None
            skipped.append(f"{place}: {error}")
        else:
            valid = True
            yield record
    if not valid:
        why = f"; the first of {len(skipped)} bad ones is {skipped[0]}" if skipped else ": it is empty"
        raise UserError(f"{path}: no valid record{why}")


PIECE = 2**16  # characters


def read_pieces(path: str | Path) -> Iterator[str]:
    """A .txt file in pieces of ``PIECE`` characters or some more; a shorter one is one piece.

    A piece ends behind a line break, or before a space, that stands between a visible character and a letter or digit:
    a tokenizer that splits at words (any byte-level BPE, characters) makes of the pieces what it makes of the whole."""
    file = Path(path).expanduser()
    decode = codecs.getincrementaldecoder("utf-8-sig")()
    text, lines, blank = "", 1, True
    with file.open("rb") as source:
        while block := source.read(PIECE):
            try:
                text += decode.decode(block)
            except UnicodeDecodeError as error:
                raise _not_unicode(file, lines + error.object.count(b"\n", 0, error.start), error) from None
            lines += block.count(b"\n")
            if len(text) > PIECE and (cut := _between_words(text)):
                blank = blank and not text[:cut].strip()
                yield text[:cut]
                text = text[cut:]
    try:
        decode.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _not_unicode(file, lines, error) from None
    if blank and not text.strip():
        raise UserError(f"{path}: no valid record: it is empty")
    if text:
        yield text


def _between_words(text: str) -> int:
    """The last such place in the last piece of ``text``; 0 where there is none."""
    for mark in ("\n", " "):
        at = len(text)
        while (at := text.rfind(mark, len(text) - PIECE, at)) > 0:
            if not text[at - 1].isspace() and text[at + 1 : at + 2].isalnum():
                return at + (mark == "\n")
    return 0


def _rows(path: str) -> Iterator[tuple[str, Any]]:
    """(place, row) of every row; a row that cannot be decoded comes as the ``ValueError`` that says why."""
    file = Path(path).expanduser()
    if not file.exists():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and file.suffix.lower() not in _READERS:
            yield from _hub_rows(path)
            return
        raise UserError(f"{path}: no such file (the current folder is {Path.cwd()})")
    if file.is_dir():
        raise UserError(f"{path}: is a folder; a file was expected ({', '.join(_READERS)})")
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: cannot tell its format from {file.suffix!r}; use one of {', '.join(_READERS)}")
    yield from reader(file)


def _read_text(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_unicode(file, data.count(b"\n", 0, error.start) + 1, error) from None


def _not_unicode(file: Path, line: int, error: UnicodeDecodeError) -> UserError:
    byte = error.object[error.start]
    return UserError(f"{file}:{line}: not UTF-8 (byte 0x{byte:02x}); save it as UTF-8 (iconv -f latin1 -t utf-8)")


def _jsonl_rows(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as lines:
        for number, data in enumerate(lines, start=1):
            try:
                line = data.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_unicode(file, number, error) from None
            if line.strip():
                try:
                    yield f"{file}:{number}", _writable(json.loads(line), line)
                except json.JSONDecodeError as error:
                    yield f"{file}:{number}", ValueError(f"not JSON ({error.msg} at column {error.colno})")


def _json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    text = _read_text(file)
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(rows, list):
        raise UserError(f"{file}: holds {_short(rows)}; a list of records was expected")
    if rows and all(map(is_task, rows)):
        yield from _label_studio_rows(file, rows)
        return
    if rows and all(map(is_other_format, rows)):
        raise UserError(f"{file}: tasks of Label Studio, or an export of another format; export the project as JSON")
    for number, row in enumerate(rows, start=1):
        yield f"{file}: record {number}", _writable(row, text)


def _label_studio_rows(file: Path, tasks: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """A ranking for each person who judged a task of a Label Studio export."""
    judged = False
    for number, task in enumerate(tasks, start=1):
        place = f"{file}: task {task.get('id', number)}"
        try:
            for row in rankings_of_task(task):
                judged = True
                yield place, _writable(row, "\\u")
        except ValueError as error:
            judged = True
            yield place, error
    if not judged:
        what = f"{len(tasks)} tasks, and none is judged (all open or skipped)"
        raise UserError(f"{file}: {what}; label some, then export again")


def _writable(row: Any, source: str) -> Any:
    """The row, or the ``ValueError`` that its text is not Unicode: half of a pair of surrogates."""
    if "\\u" in source:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            return ValueError(f"holds half a character ({half}), as a text that was cut inside an emoji does")
    return row


def _csv_rows(file: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # characters; texts may be longer than its 131,072
    reader = csv.DictReader(io.StringIO(_read_text(file), newline=""), strict=True)
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:  # a quote that is never closed, say
            yield f"{file}:{first}", ValueError(f"not CSV ({error})")
            continue
        if row is None:
            return
        if None in row or None in row.values():
            yield f"{file}:{reader.line_num}", ValueError(f"not as many fields as the header ({reader.fieldnames})")
        else:
            yield f"{file}:{reader.line_num}", row


def _txt_rows(file: Path) -> Iterator[tuple[str, Any]]:
    text = _read_text(file)
    if text.strip():
        yield f"{file}:1", {"text": text}


def _parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    from datasets import Dataset  # imported here: it takes longer than everything else together

    try:
        rows = Dataset.from_parquet(str(file))
    except Exception as error:  # pyarrow has many kinds
        raise UserError(f"{file}: not a Parquet file ({error})".splitlines()[0]) from None
    for number, row in enumerate(rows, start=1):
        yield f"{file}: record {number}", row


def _hub_rows(name: str) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split="train")
    except Exception as error:  # network, name, configuration: the library has many kinds
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name}: no such file here, and as a Hub data set it could not be loaded ({reason}). Offline: download it "
            "elsewhere and give the path of the file."
        ) from None
    for number, row in enumerate(rows, start=1):
        yield f"{name}: record {number}", row


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".txt": _txt_rows,
}


def prompt_key(messages: Sequence[dict[str, str]]) -> str:
    """The prompt as one unambiguous string."""
    return json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False)


def prompt_fingerprint(messages: Sequence[dict[str, str]]) -> str:
    """16 hex digits that are the same for prompts which differ in case, in spaces, in Unicode's spellings or in the
    system message only."""
    turns = [
        {"role": m["role"], "content": " ".join(unicodedata.normalize("NFKC", m["content"]).casefold().split())}
        for m in messages
        if m["role"] != "system"
    ]
    return hashlib.sha256(prompt_key(turns).encode(errors="surrogatepass")).hexdigest()[:16]


def shown(messages: Sequence[dict[str, str]]) -> str:
    """A prompt for a person's eye: its turns one after the other."""
    return " / ".join(m["content"] for m in messages)


def is_held_out(messages: Sequence[dict[str, str]], fraction: float, seed: int, fold: int = 0) -> bool:
    """Whether a prompt belongs to the held-out part; with another ``fold`` it is another part, apart from the first.

    It depends on the prompt's text and the seed alone: the same prompt falls on the same side in every stage and file,
    so that no prompt of the test set was seen in training."""
    digest = hashlib.sha256(f"{seed}\n{prompt_key(messages)}".encode()).digest()
    return fold * fraction <= int.from_bytes(digest[:8], "big") / 2**64 < (fold + 1) * fraction


def split_by_prompt(
    records: Sequence[Record], prompt: Callable[[Record], Messages], fraction: float, seed: int, fold: int = 0
) -> tuple[list[Record], list[Record]]:
    """(train, held out) by :func:`is_held_out`. Raises ``UserError`` where one side would be empty, or there is no such
    fold."""
    if (fold + 1) * fraction > 1 + 1e-9:
        raise UserError(f"fold={fold}: held_out={fraction:g} makes {int(1 / fraction + 1e-9)} folds, counted from 0")
    held = [is_held_out(prompt(record), fraction, seed, fold) for record in records]
    train = [r for r, h in zip(records, held) if not h]
    held_out = [r for r, h in zip(records, held) if h]
    if not train or (fraction > 0 and not held_out):
        raise UserError(
            f"{len(records)} records are too few to hold out {fraction:.0%} of their prompts: {len(train)} would be "
            f"left to train on, {len(held_out)} to test on. Give more records, another held_out or split.seed."
        )
    return train, held_out


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines under a temporary name, then rename: a killed run leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    temporary.replace(path)


def _require(row: dict[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise ValueError(f"no field '{name}' (it has {', '.join(map(str, row)) or 'none'})")
    return row[name]


def _text(row: dict[str, Any], name: str) -> str:
    value = _require(row, name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"'{name}' is {_short(value)}; a non-empty string was expected")
    return value


def _messages(value: Any, name: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise ValueError(f"'{name}' is {_short(value)}; a non-empty list of messages was expected")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"'{name}' holds {_short(message)}; each message needs 'role' and 'content'")
        if message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"'{name}' has the role {message.get('role')!r}; system, user or assistant was expected")
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _prompt(value: Any, name: str) -> Messages:
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"'{name}' is empty")
        messages = parse_transcript(value) if _TURN.match(value) else [{"role": "user", "content": value}]
    else:
        messages = _messages(value, name)
    if not messages or messages[-1]["role"] == "assistant":
        raise ValueError(f"'{name}' ends with a turn of the assistant; a prompt ends with the user's")
    return messages


def _instruction(row: dict[str, Any]) -> Messages:
    instruction = _text(row, "instruction")
    context = row.get("input") or ""
    if not isinstance(context, str):
        raise ValueError(f"'input' is {_short(context)}; a string was expected")
    return [{"role": "user", "content": f"{instruction}\n\n{context}" if context.strip() else instruction}]


_TURN = re.compile(r"\s*(Human|Assistant):")


def parse_transcript(text: str) -> Messages:
    """Messages of a transcript ``\\n\\nHuman: ... \\n\\nAssistant: ...`` (hh-rlhf)."""
    pieces = re.split(r"(?:^|\n\n)\s*(Human|Assistant):", text)
    if len(pieces) < 3 or pieces[0].strip():
        raise ValueError(f"{_short(text)} is not a transcript of Human: and Assistant: turns")
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = [{"role": roles[r], "content": c.strip()} for r, c in zip(pieces[1::2], pieces[2::2])]
    # A transcript that ends with an open "Assistant:" is a prompt.
    return messages[:-1] if messages[-1]["role"] == "assistant" and not messages[-1]["content"] else messages


def _pair(row: dict[str, Any]) -> tuple[Messages, list[str]]:
    chosen, rejected = _require(row, "chosen"), _require(row, "rejected")
    if "prompt" in row or "instruction" in row:
        prompt = parse_prompt(row)
        return prompt, [_answer(chosen, "chosen", prompt), _answer(rejected, "rejected", prompt)]
    return _common_prompt(*(_dialogue(row, name) for name in ("chosen", "rejected")))


def _answer(value: Any, name: str, prompt: Messages) -> str:
    """The answer, of which whole transcripts and messages may repeat the prompt."""
    if isinstance(value, str) and not value.lstrip().startswith("Human:"):
        return value
    if not isinstance(value, str | list):
        raise ValueError(f"'{name}' is {_short(value)}; an answer or messages were expected")
    messages = _assistants(_dialogue({name: value}, name), name)
    start = 0 if messages[0]["role"] == "assistant" else len(messages) - 1
    asked, before = (
        [m["content"].strip() for m in turns if m["role"] != "system"] for turns in (prompt, messages[:start])
    )
    if before and before != asked:
        raise ValueError(f"'{name}' answers {_short(before[-1])}, but 'prompt' is {_short(asked[-1])}")
    return _transcript_tail(messages[start:])


def _dialogue(row: dict[str, Any], name: str) -> Messages:
    if isinstance(row[name], list):
        return _messages(row[name], name)
    if not isinstance(row[name], str) or not _TURN.match(row[name]):
        raise ValueError(f"no 'prompt', and '{name}' is {_short(row[name])}, not a transcript of Human: and Assistant:")
    messages = parse_transcript(row[name])
    # An empty last answer was parsed as an open prompt; in a pair it is an answer that says nothing.
    if row[name].rstrip().endswith("Assistant:"):
        messages = [*messages, {"role": "assistant", "content": ""}]
    return _assistants(messages, name)


def _assistants(messages: Messages, name: str) -> Messages:
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"'{name}' ends with a turn of the {messages[-1]['role']}; it must end with the assistant's")
    return messages


def _common_prompt(chosen: Messages, rejected: Messages) -> tuple[Messages, list[str]]:
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    turns = [(a["role"], b["role"]) for a, b in zip(chosen, rejected)]
    while shared and (turns[shared - 1][0] != "user" or turns[shared] != ("assistant", "assistant")):
        shared -= 1
    if not shared:
        raise ValueError("'chosen' and 'rejected' do not begin with the same turn of the user and an answer to it")
    # Where the dialogues part before the last answer, everything after the shared prompt is the answer.
    return chosen[:shared], [_transcript_tail(dialogue[shared:]) for dialogue in (chosen, rejected)]


def _transcript_tail(messages: Messages) -> str:
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    first, *rest = messages
    return first["content"] + "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in rest)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
