"""Small files: read where they are there, and written whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_text(path: Path, text: str) -> Path:
    """Write under a temporary name, then rename: who is killed leaves no half file. Returns the path."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two commands may write one summary
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path
