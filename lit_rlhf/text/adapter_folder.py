"""Folders of adapters as peft writes them: they name the model that they belong on, and may bring a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from lit_rlhf.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter rather than a model."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def base_of_adapter(path: str | Path) -> str:
    """The folder or Hub name of the model that an adapter belongs on; a path may count from the adapter's folder.

    Raises ``UserError`` where it names none, or one that is not there."""
    file = Path(path) / ADAPTER_CONFIG
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None
    if not base:
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
