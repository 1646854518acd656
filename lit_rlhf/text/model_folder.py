"""Folders of models and adapters: what their settings say, and where an adapter's model is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from lit_rlhf.errors import UserError
from lit_rlhf.files import Checked, check_regular, read_json

ADAPTER_CONFIG = "adapter_config.json"
Count = Annotated[int, Field(le=10_000)] | None


class Foreign(Checked):
    """A file of another program's, with no format of ours."""

    format: Any = None


class ModelConfig(Foreign):
    """Fields of config.json that are read before transformers makes a model of it."""

    architectures: list[str] | None = None
    bos_token_id: int | list[int] | None = None
    eos_token_id: int | list[int] | None = None
    # A module each: memory would be gone before the weights could say that there are fewer.
    num_hidden_layers: Count = None
    n_layer: Count = None
    num_experts: Count = None
    num_local_experts: Count = None


def model_settings(folder: str | Path, name: str = "config.json") -> dict[str, Any]:
    """Contents of config.json (or the file ``name``) of a folder; empty where there is none.

    Raises ``UserError`` where it is damaged."""
    return read_json(Path(folder) / name, ModelConfig if name.endswith("config.json") else Foreign)


def check_regular_files(folder: str | Path) -> None:
    """Raise ``UserError`` where a file of a folder is a pipe, which would be waited for, or a device."""
    for file in Path(folder).iterdir() if Path(folder).is_dir() else ():
        if file.exists() and not file.is_dir():
            check_regular(file)


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
