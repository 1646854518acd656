"""Checkpoint files: written whole, read without a second copy in memory, and checked for damage."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_rlhf.errors import UserError, first_line
from lit_rlhf.files import check_regular, damaged
from lit_rlhf.models.checkpoint import put_in_place
from lit_rlhf.training.checkpoint_shards import REST, read_shards


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
    """``torch.load``; on Linux and macOS tensors stay on disk until they are looked at.

    A folder of shards is read whole. Raises ``UserError`` where the file is not what was written."""
    path = Path(path)
    if (path / REST).is_file():
        return read_shards(path)
    try:
        check_regular(path)
        with zipfile.ZipFile(path) as file:  # which keeps a checksum of each tensor; torch does not look at them
            wrong = file.testzip()
        # Elsewhere a file that is mapped cannot be replaced by the next checkpoint.
        found = None if wrong else torch.load(path, "cpu", weights_only=weights_only, mmap=os.name == "posix")
    except UserError:
        raise
    except Exception as error:  # zipfile and pickle have many kinds
        raise damaged(path, first_line(error)) from None
    if not isinstance(found, dict) or "state_dict" not in found:
        raise damaged(path, f"{wrong} was changed" if wrong else "no checkpoint of a training")
    return found


def keep_checkpoint(new: Path, path: Path) -> None:
    """Let a checkpoint, a file or a folder, take the place of ``path``."""
    if new.is_file() and not path.is_dir():
        new.replace(path)
    else:
        put_in_place(new, path)


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's own puts a whole file together in memory, and reads one whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_checkpoint(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(path, weights_only)
