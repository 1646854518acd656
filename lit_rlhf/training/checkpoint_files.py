"""Checkpoint files: written whole, read without a second copy in memory, and checked for damage."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_rlhf.errors import UserError, first_line
from lit_rlhf.files import check_regular, damaged
from lit_rlhf.models.checkpoint import put_in_place
from lit_rlhf.training.checkpoint_shards import REST, read_shards
from lit_rlhf.training.torch_file import check_sums, write_whole


def read_checkpoint(path: str | Path, weights_only: bool | None = True) -> dict[str, Any]:
    """``torch.load``; on Linux and macOS tensors stay on disk until they are looked at.

    A folder of shards is read whole. Raises ``UserError`` where the file is not what was written."""
    path = Path(path)
    if (path / REST).is_file():
        return read_shards(path)
    try:
        check_regular(path)
        check_sums(path)
        # Elsewhere a file that is mapped cannot be replaced by the next checkpoint.
        found = torch.load(path, "cpu", weights_only=weights_only, mmap=os.name == "posix")
    except UserError:
        raise
    except Exception as error:  # zipfile and pickle have many kinds
        raise damaged(path, first_line(error)) from None
    if not isinstance(found, dict) or "state_dict" not in found:
        raise damaged(path, "no checkpoint of a training")
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
        write_whole(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(path, weights_only)
