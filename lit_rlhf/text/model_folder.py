"""Folders of models and adapters: what their settings say, and where an adapter's model is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lit_rlhf.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"


def model_settings(folder: str | Path, name: str = "config.json") -> dict[str, Any]:
    """What the config.json (or the file ``name``) of a folder says; nothing where there is none.

    Raises ``UserError`` where it is damaged."""
    file = Path(folder) / name
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise UserError(f"{file}: no JSON ({error}); copy it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: settings were expected, and {str(found)[:40]} was found; copy it again")
    return found


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter rather than a model."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def base_of_adapter(path: str | Path) -> str:
    """The folder or Hub name of the model that an adapter belongs on; a path may count from the adapter's folder.

    Raises ``UserError`` where it names none, or one that is not there."""
    file, base = Path(path) / ADAPTER_CONFIG, model_settings(path, ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise UserError(
            f"{file}: it names no model that the adapter is for; write its folder as base_model_name_or_path"
        )
    for folder in (Path(base), Path(path) / base):
        if (folder / "config.json").is_file():
            return str(folder)
    if Path(base).is_absolute() or base.startswith(".") or len(Path(base).parts) > 2:
        raise UserError(
            f"{file}: the adapter is for {base}, which is not there; write where it is (base_model_name_or_path)"
        )
    return str(base)
