"""Checkpoint folders of sharded trainings: each process writes and reads its own part of weights and optimizer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from lit_rlhf.errors import UserError, first_line
from lit_rlhf.files import check_regular, damaged
from lit_rlhf.models.checkpoint import put_in_place

REST = "rest.pt"  # all but the tensors of weights and optimizers


def write_shards(checkpoint: dict[str, Any], path: Path) -> None:
    """Write what all processes have of a checkpoint as the folder ``path``, under another name first."""
    part = _begun(checkpoint, path)
    dcp.save(tensors_of(checkpoint), checkpoint_id=part)
    if dist.get_rank() == 0:
        put_in_place(part, path)
    dist.barrier()


class ShardsToCome:
    """The same, written from copies in a thread of each process, while training goes on.

    Args:
        checkpoint: what is copied, as it is now.
        path: the folder.
        group: of all processes, by gloo, for these threads alone.
    """

    def __init__(self, checkpoint: dict[str, Any], path: Path, group: Any) -> None:
        self._part, self._path = _begun(checkpoint, path), path
        self._written = dcp.async_save(tensors_of(checkpoint), checkpoint_id=self._part, process_group=group)

    def there(self) -> bool:
        """Whether the parts of all processes are written, or one of them could not be."""
        return self._written.done()

    def place(self) -> None:
        """Let the folder have its name, when it is written. Raises what kept a process from writing its part."""
        self._written.result()
        if dist.get_rank() == 0:
            put_in_place(self._part, self._path)


def _begun(checkpoint: dict[str, Any], path: Path) -> Path:
    """The folder, under another name, with all but the tensors."""
    part = path.with_name(f"{path.name}.part")
    if dist.get_rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        optimizers = [{"param_groups": state["param_groups"]} for state in checkpoint.get("optimizer_states", ())]
        torch.save({**checkpoint, "state_dict": {}, "optimizer_states": optimizers}, part / REST)
    dist.barrier()
    return part


def read_shards(path: Path, into: Mapping[str, Tensor] | None = None, optimizers: bool = True) -> dict[str, Any]:
    """The checkpoint in a folder, as one process would write it.

    ``into``: tensors by the names of :func:`tensors_of`, sharded ones too, which are filled, by all processes together;
    None: whole tensors, by this process alone. Without ``optimizers`` their tensors are not read. Raises ``UserError``
    where the folder is not what was written."""
    try:
        check_regular(path / REST)
        rest = torch.load(path / REST, "cpu", weights_only=True)
        saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        tensors = {
            name: into[name]
            if into is not None and name in into and into[name].shape == found.size
            else torch.empty(found.size, dtype=found.properties.dtype)
            for name, found in saved.items()
            if optimizers or name.startswith("state_dict.")
        }
        dcp.load(tensors, checkpoint_id=path, no_dist=into is None)
    except UserError:
        raise
    except Exception as error:  # torch's readers have many kinds
        raise damaged(path, first_line(error)) from None
    for name, tensor in tensors.items():
        kind, _, own = name.partition(".")
        if kind == "state_dict":
            rest["state_dict"][own] = tensor
        else:
            number, parameter, key = own.split(".")
            state = rest["optimizer_states"][int(number)].setdefault("state", {})
            state.setdefault(int(parameter), {})[key] = tensor
    return rest


def tensors_of(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Those of weights and optimizers, by name."""
    tensors = {f"state_dict.{name}": tensor for name, tensor in checkpoint["state_dict"].items()}
    for number, saved in enumerate(checkpoint.get("optimizer_states", ())):
        for parameter, values in saved["state"].items():
            tensors |= {f"optimizer.{number}.{parameter}.{key}": value for key, value in values.items()}
    return tensors
