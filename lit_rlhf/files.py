"""Small files: read where they are there, and written whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@contextmanager
def written_anew(path: Path) -> Iterator[TextIO]:
    """A file to write into, under a temporary name, then renamed to ``path``: who is killed leaves no half file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two commands may write one summary
    with temporary.open("w", encoding="utf-8") as file:
        yield file
    temporary.replace(path)


def write_text(path: Path, text: str) -> Path:
    """Write a file whole (see :func:`written_anew`). Returns the path."""
    with written_anew(path) as file:
        file.write(text)
    return path
