"""Files of ``torch.save``: written whole or not at all, and read where each tensor's checksum is right."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch


@contextmanager
def disk_errors() -> Iterator[None]:
    """Context that raises what the disk refused: torch ends the file all the same, which fails in its own way."""
    try:
        yield
    except RuntimeError as error:
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def write_whole(value: Any, path: Path) -> None:
    """``torch.save`` under another name first. Raises ``OSError`` where it cannot be written."""
    temporary = Path(f"{path}.part")
    path.parent.mkdir(exist_ok=True)
    try:
        with disk_errors(), temporary.open("wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_sums(file: Path | IO[bytes]) -> None:
    """Raise ``ValueError`` where a part of the file is not what was written; ``torch.load`` does not look at that."""
    with zipfile.ZipFile(file) as parts:
        if wrong := parts.testzip():
            raise ValueError(f"{wrong} was changed")
