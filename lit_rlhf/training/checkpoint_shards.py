"""Checkpoint folders of sharded trainings: each process writes and reads its own part of weights and optimizer."""

from __future__ import annotations

import io
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from lit_rlhf.errors import first_line
from lit_rlhf.files import damaged
from lit_rlhf.models.checkpoint import put_in_place
from lit_rlhf.training.torch_file import check_sums, disk_errors, write_whole

REST = "rest.pt"  # all but the tensors of weights and optimizers
INDEX = ".metadata"  # which tensor lies where: a pickle of torch's, behind which its SHA-256 is added
IN_INDEX = {  # what a pickle there is made of; it may name nothing else
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}  # fmt: skip


@contextmanager
def own_errors() -> Iterator[None]:
    """Context that raises what a process has failed with, what its disk refused first; torch's exception of all
    processes is no ``Exception``."""
    try:
        yield
    except CheckpointException as error:
        failures = [failure for failure, _ in error.failures.values()]
        raise next((each for each in failures if isinstance(each, OSError)), failures[0]) from None


class ShardWriter(dcp.FileSystemWriter):
    """Torch's, which fails with what the disk refused."""

    def write_data(self, *given: Any) -> Any:
        with disk_errors():
            return super().write_data(*given)


class ShardReader(dcp.FileSystemReader):
    """Torch's, which reads what has the checksum that it was written with, and calls nothing that the index names."""

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        tensor = io.BytesIO(super()._slice_file(file, sinfo).read(-1))
        check_sums(tensor)
        tensor.seek(0)
        return tensor

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        data = Path(self.path, INDEX).read_bytes()
        if sha256(data[:-32]).digest() != data[-32:]:
            raise ValueError(f"{INDEX} was changed")
        index = _Index(io.BytesIO(data)).load()
        index.storage_meta = index.storage_meta or StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index  # type: ignore[no-any-return]


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in IN_INDEX.get(module, ()):
            raise ValueError(f"{INDEX} names {module}.{name}")
        return super().find_class(module, name)


def write_shards(checkpoint: dict[str, Any], path: Path) -> None:
    """Write what all processes have of a checkpoint as the folder ``path``, under another name first."""
    part = _begun(checkpoint, path)
    with own_errors():
        dcp.save(tensors_of(checkpoint), storage_writer=ShardWriter(part))
    _name(part, path)
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
        self._written = dcp.async_save(
            tensors_of(checkpoint), storage_writer=ShardWriter(self._part), process_group=group
        )

    def there(self) -> bool:
        """Whether the parts of all processes are written, or one of them could not be."""
        return self._written.done()

    def place(self) -> None:
        """Let the folder have its name, when it is written. Raises what kept a process from writing its part."""
        with own_errors():
            self._written.result()
        _name(self._part, self._path)


def _begun(checkpoint: dict[str, Any], path: Path) -> Path:
    """The folder, under another name, with all but the tensors."""
    part = path.with_name(f"{path.name}.part")
    if dist.get_rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        optimizers = [{"param_groups": state["param_groups"]} for state in checkpoint.get("optimizer_states", ())]
        write_whole({**checkpoint, "state_dict": {}, "optimizer_states": optimizers}, part / REST)
    dist.barrier()
    return part


def _name(part: Path, path: Path) -> None:
    """Let the folder that all processes have written have its name."""
    if dist.get_rank() == 0:
        with (part / INDEX).open("r+b") as file:
            file.write(sha256(file.read()).digest())
        put_in_place(part, path)


def read_shards(path: Path, into: Mapping[str, Tensor] | None = None, optimizers: bool = True) -> dict[str, Any]:
    """The checkpoint in a folder, as one process would write it.

    ``into``: tensors by the names of :func:`tensors_of`, sharded ones too, which are filled, by all processes together;
    None: whole tensors, by this process alone. Without ``optimizers`` their tensors are not read. Raises ``UserError``
    where the folder is not what was written."""
    try:
        for file in sorted({path / REST, *path.iterdir()}):
            if not file.is_file():  # a pipe would be waited for
                raise ValueError(f"{file.name} is not there, or no file")
        check_sums(path / REST)
        rest = torch.load(path / REST, "cpu", weights_only=True)
        reader = ShardReader(path)
        saved = reader.read_metadata().state_dict_metadata
        tensors = {
            name: into[name]
            if into is not None and name in into and into[name].shape == found.size
            else torch.empty(found.size, dtype=found.properties.dtype)
            for name, found in saved.items()
            if optimizers or name.startswith("state_dict.")
        }
        with own_errors(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process, as asked
            dcp.load(tensors, storage_reader=reader, no_dist=into is None)
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
