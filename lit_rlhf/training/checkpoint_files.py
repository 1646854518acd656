"""Checkpoint files, written and read without a second copy in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO


def write_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """``torch.save``, under another name first: whole or not at all. Raises ``OSError`` where it cannot be written."""
    path, temporary = Path(path), Path(f"{path}.part")
    path.parent.mkdir(exist_ok=True)
    try:
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except RuntimeError as error:  # torch ends the file all the same, which fails in its own way
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: str | Path, weights_only: bool | None = True) -> dict[str, Any]:
    """``torch.load``; on Linux and macOS tensors stay on disk until they are looked at."""
    # Elsewhere a file that is mapped cannot be replaced by the next checkpoint.
    return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=os.name == "posix")


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's own puts a whole file together in memory, and reads one whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(path, weights_only)
