"""A run's own files: each kind has one reader, which names what is damaged and what can be done; written whole."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from lit_rlhf.errors import UserError, first_line, say

FORMAT = 1  # of done.json and config.yaml; it rises where an older version could not read what is written

# What can be done where a file is damaged.
CURES = {
    "done.json": "put it back, or delete it: the same command then ends the stage again, from its last checkpoint",
    "config.yaml": "put it back, or do the stage again with overwrite=true",
    "last.ckpt": "put it back, or delete it: the same command then trains the stage from its beginning",
    "best.ckpt": "put it back, or do the stage again with overwrite=true",
    "metrics.csv": "put it back, or delete it: all else goes on without the figures up to here",
    "samples.jsonl": "put it back, or delete it: all else goes on without the samples up to here",
    "health.jsonl": "put it back, or delete it: all else goes on without the findings up to here",
    "trained_prompts.txt": "put it back, or do the stage again with overwrite=true",
    "split.json": "put it back: without it prompts that were held out may be trained on",
    "summary.json": "delete it: stage=report writes it anew",
    "run_id": "put it back, or delete it: W&B then has what follows as a run of its own",
    "job.json": "delete it: the sweep's table is then made without the job",
}
NEW = ".new"  # ends the name of the folder in which a stage is done again, until it takes the place of the old one


class Checked(BaseModel):
    """Known fields of a file; others may stand beside them."""

    model_config = ConfigDict(extra="allow", strict=True)

    format: int = 0


def damaged(path: Path, reason: str, line: int | None = None, cure: str | None = None) -> UserError:
    """The error about a file that is there, and is not what it should be."""
    place = f"{path}:{line}" if line else str(path)
    return UserError(f"{place}: damaged ({reason}); {cure or CURES.get(path.name, 'put it back')}")


def read_bytes(path: Path) -> bytes | None:
    """A file's bytes; None where there is none. Raises ``UserError`` where it cannot be read."""
    try:
        check_regular(path)
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise damaged(path, f"cannot be read: {error.strerror}") from None


def check_regular(path: Path) -> None:
    """Raise ``UserError`` for a folder, a pipe (which would be waited for) or a device."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise damaged(path, "no file: a folder, a pipe or a device")


def read_text(path: Path) -> str | None:
    """A file's text; None where there is no such file. Raises ``UserError`` where it cannot be read."""
    data = read_bytes(path)
    try:
        return None if data is None else data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise damaged(path, f"byte 0x{error.object[error.start]:02x} is no UTF-8", line) from None


def json_value(text: str) -> Any:
    """The value of a JSON text; ``ValueError`` says why it has none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("not JSON that can be read (lists or objects in each other, thousands deep)") from None
    except ValueError:  # Python's limit to what it makes a number of
        raise ValueError("not JSON that can be read (a whole number of thousands of digits)") from None


def read_json(path: Path, shape: type[Checked] = Checked) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no such file."""
    text = read_text(path)
    if text is None:
        return {}
    try:
        value = json_value(text)
    except ValueError as error:
        raise damaged(path, str(error)) from None
    return _fitting(path, value, shape)


def read_jsonl(path: Path, shape: type[Checked] = Checked) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; none where there is no such file.

    A last line without its end that is no object is left out, and a line says so. Raises ``UserError``, naming the
    line, for other damage."""
    *lines, last = (read_bytes(path) or b"").split(b"\n")
    rows = []
    for number, line in enumerate([*lines, last], 1):
        if line.strip():
            try:
                value = json_value(line.decode("utf-8"))
            except ValueError as error:
                if number > len(lines):
                    say(f"{path}: its last line has no end; it is left out")
                    break
                raise damaged(path, str(error), number) from None
            rows.append(_fitting(path, value, shape, number))
    return rows


def read_yaml(path: Path, shape: type[Checked] = Checked) -> dict[str, Any]:
    """Settings as :func:`write_yaml` wrote them; none where there is no such file."""
    text = read_text(path)
    if text is None:
        return {}
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise damaged(path, first_line(error)) from None
    found = _fitting(path, value, shape)
    if found.get("format") and not text.endswith("\n...\n"):
        raise damaged(path, "its end is missing")
    return found


def write_yaml(path: Path, settings: dict[str, Any]) -> None:
    """Write settings with their format before them, and what says that they are whole behind."""
    write_text(path, yaml.safe_dump({"format": FORMAT, **settings}, sort_keys=False, explicit_end=True))


def _fitting(path: Path, value: Any, shape: type[Checked], line: int | None = None) -> dict[str, Any]:
    """``value``, which was read from ``path``, where it is an object of this ``shape`` that this version knows."""
    if not isinstance(value, dict):
        raise damaged(path, f"holds {str(value)[:40]!r}, where an object with named fields was expected", line)
    if isinstance(written := value.get("format"), int) and written > FORMAT:
        raise UserError(
            f"{path}: written by a newer version of lit_rlhf (format {written}, and this one reads up to {FORMAT}); "
            "install that version"
        )
    try:
        shape.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise damaged(path, f"{where}: {first['msg']}, and {str(first['input'])[:40]!r} was found", line) from None
    return value


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Context that turns errors of the operating system (no space, say) into a ``UserError`` that names ``path``."""
    try:
        yield
    except Exception as error:
        if (reason := refused(error)) is None:
            raise
        raise UserError(
            f"{path}: cannot be written ({reason}); make room for it or choose another folder, then run the same "
            "command again"
        ) from error


def final(path: Path) -> Path:
    """Where what is written to ``path`` will stand when its stage is whole."""
    return Path(*(part.removesuffix(NEW) for part in path.parts))


def make_folder(folder: Path) -> Path:
    """Make a folder and those that it lies in, where they are not there. Raises ``UserError`` where it cannot be."""
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def refused(error: Exception) -> str | None:
    """The operating system's reason for an error; None where it has none. Libraries in Rust tell it in their text."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    found = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(found[1])) if found else None


@contextmanager
def written_anew(path: Path, mode: str = "w") -> Iterator[Any]:
    """A file to write into, under a temporary name, then renamed to ``path``: who is killed leaves no half file.

    Raises ``UserError`` where it cannot be written; what was there stays."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two commands may write one summary
    with disk(path):
        try:
            with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
            temporary.replace(path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise


def write_json(path: Path, value: Any) -> Path:
    """Write a value as JSON for people and programs, the file whole. Returns the path."""
    return write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Write a file whole (see :func:`written_anew`). Returns the path."""
    with written_anew(path) as file:
        file.write(text)
    return path
