"""Record of a finished stage: ``done.json``, with a digest of each file that it ended with."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field

from lit_rlhf.errors import UserError, say_once
from lit_rlhf.files import FORMAT, Checked, damaged, read_json, write_json

FILE = "done.json"
CARD = "README.md"  # of a model
PARTS = ("model", "adapter", "trained_prompts.txt")  # what other stages read
WHILE_RUNNING = {"checkpoints", "wandb", "profile", FILE}  # what nobody needs when the stage is finished


class Done(Checked):
    """The fields of ``done.json`` that others read; older versions wrote some of them."""

    stage: str = ""
    figures: dict[str, Any] = Field(default_factory=dict)
    seconds: float | None = None
    inputs: dict[str, str] = Field(default_factory=dict)  # path, seen from the run -> digest, of what it was made from
    files: dict[str, str] = Field(default_factory=dict)  # the same of what it ended with, seen from its own folder
    memory: dict[str, float] = Field(default_factory=dict)
    cost: dict[str, float] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)


def read_done(folder: Path) -> dict[str, Any]:
    """The record of the finished stage in ``folder``; empty where it is not finished."""
    found = read_json(folder / FILE, Done)
    lacks = [name for name in ("stage", "figures", "seconds", "inputs", "files") if name not in found]
    if lacks and (found.get("format") or (not found and (folder / FILE).exists())):
        raise damaged(folder / FILE, f"no {lacks[0]}")
    return {**Done().model_dump(), **found} if found else {}


def write_done(folder: Path, record: dict[str, Any], beside: list[Path]) -> None:
    """Mark the stage in ``folder`` as finished; ``beside``: files elsewhere that it ended with, too."""
    own = [file for file in sorted(folder.rglob("*")) if file.relative_to(folder).parts[0] not in WHILE_RUNNING]
    kept = (file for file in [*own, *beside] if file.is_file() and file.suffix != ".tmp")
    files = [file for file in kept if file.name != CARD]  # which people go on writing
    record = {"format": FORMAT, **record, "files": {os.path.relpath(f, folder): digest_of(f) for f in files}}
    write_json(folder / FILE, record)


def changes(folder: Path) -> dict[str, str]:
    """File -> what became of it ("changed", say), of those with which the stage in ``folder`` ended."""
    found = {}
    for name, digest in read_done(folder).get("files", {}).items():
        file = folder / name
        if not file.is_file():
            found[name] = "no file any more" if file.exists() else "gone"
        elif (now := digest_of(file)) != digest:
            found[name] = f"changed (now {now}, then {digest})"
    return found


def check_unchanged(path: Path) -> None:
    """Raise ``UserError`` where a file or folder of a finished stage is not as the stage left it; others may be so."""
    path = path.resolve()
    of_a_stage = path.name in PARTS and (path.parent / "config.yaml").is_file()
    if of_a_stage and path.exists() and not (path.parent / FILE).exists():
        say_once(f"{path}: its stage has not ended ({FILE} is not there), so nobody knows whether it is whole")
    for name, how in changes(path.parent).items():
        if Path(name).parts[0] == path.name:
            raise UserError(
                f"{path.parent / name}: {how} since stage {path.parent.name} ended; put it back, or do the stage again "
                f"with overwrite=true. Where it is meant, copy {path.name} elsewhere and give the path of that"
            )


def digest_of(file: Path) -> str:
    """A file's size and SHA-256, 16 hex digits; or why it cannot be read."""
    try:
        known = file.stat()
        return f"{known.st_size} bytes {_sha256(file, known.st_size, known.st_mtime_ns, known.st_ino)}"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


@cache
def _sha256(file: Path, *_: int) -> str:
    """Once for what has not been written since: a model is looked at by each command several times."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]
