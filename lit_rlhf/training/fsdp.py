"""Models sharded over processes: torch's FSDP2 (``fully_shard``) by Lightning's ``ModelParallelStrategy``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lit_rlhf.errors import UserError
from lit_rlhf.models.gathering import end_root, make_root
from lit_rlhf.models.heads import Critic
from lit_rlhf.models.kernels.allocator import give_back_freed_memory
from lit_rlhf.models.loading import intended_dtype, is_intended
from lit_rlhf.models.logits import check_logits
from lit_rlhf.models.micro_batches import backbones
from lit_rlhf.models.policy import layers, packs
from lit_rlhf.models.quantization import is_quantized
from lit_rlhf.models.reward_head import RewardTransformer
from lit_rlhf.training.checkpoint_shards import ShardsToCome, read_shards, tensors_of, write_shards

PRECISIONS = {"32-true": None, "bf16-true": None, "bf16-mixed": torch.bfloat16}  # of gathered weights; None: their own


class FSDP2(ModelParallelStrategy):
    """Weights, gradients and the optimizer's state of all models lie sharded over the processes, the frozen ones' too.

    Each decoder layer is gathered while it is computed, then what is left of each model. With bf16-mixed precision the
    gathered weights are in bfloat16, and gradients are summed in float32. Checkpoints are folders: a training goes on
    with any number of processes.

    Args:
        layer_classes: names of the classes of decoder layers; None: as transformers marks them.
        save_async: checkpoints are copied in memory, and written while training goes on.
    """

    def __init__(self, layer_classes: Sequence[str] | None = None, save_async: bool = False) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)
        self.layer_classes, self.save_async = layer_classes, save_async
        self._to_come: ShardsToCome | None = None
        self._writers: Any = None  # the process group of the threads that write

    def check(self, precision: str, compile: bool) -> None:
        """Raise ``UserError`` for settings of a trainer that do not go together with sharding."""
        if precision not in PRECISIONS:
            raise UserError(f"trainer.precision={precision}: with strategy=fsdp2 it is one of {', '.join(PRECISIONS)}")
        if compile:
            raise UserError("trainer.compile=true: not with strategy=fsdp2; leave it off")

    def _setup_distributed(self) -> None:
        with torch.random.fork_rng(devices=[]):  # Lightning's own seeds anew, and one process does not
            super()._setup_distributed()
        self._data_parallel_size = self.world_size

    def shard(self, module: nn.Module) -> None:
        """Shard the models inside ``module``, each by itself; what is sharded stays so."""
        give_back_freed_memory()
        module = self.precision_plugin.convert_module(module)
        settings: dict[str, Any] = {"mesh": self.device_mesh["data_parallel"], "reshard_after_forward": True}
        precision = str(self.precision_plugin.precision)
        if gathered := PRECISIONS[precision]:
            settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32)
        for root in _roots(module):
            if isinstance(root, FSDPModule):
                continue
            if isinstance(root, PreTrainedModel) and root.can_generate():
                check_logits(root)
            dtypes = (intended_dtype(part) for part in root.modules() if is_intended(part))
            dtype = None if precision == "bf16-true" else next(dtypes, None)
            for backbone in backbones(root):
                packs(backbone)  # how it is computed is asked while its weights are whole
                for layer in self._layers(backbone):
                    fully_shard(_cast(layer, dtype), **settings)
            fully_shard(_cast(root, dtype), **settings)
            make_root(root)

    def check_layers(self, module: nn.Module) -> None:
        """Raise ``UserError`` where a model inside ``module`` has no decoder layers that could be sharded."""
        for root in _roots(module):
            for backbone in backbones(root):
                self._layers(backbone)

    def _layers(self, backbone: PreTrainedModel) -> list[nn.Module]:
        if is_quantized(backbone):
            raise UserError("trainer.strategy=fsdp2 shards no weights of 4 bits; leave quantization at null")
        named = self.layer_classes
        found = layers(backbone) if named is None else [m for m in backbone.modules() if type(m).__name__ in named]
        if not found:
            lists = (part for part in backbone.modules() if isinstance(part, nn.ModuleList))
            repeated = sorted({type(layer).__name__ for part in lists for layer in part})
            given = "transformers marks none" if named is None else f"none is a {' or '.join(named)}"
            raise UserError(
                f"trainer.strategy=fsdp2: {type(backbone).__name__} has no decoder layers that could be sharded: "
                f"{given}. Give the names of their classes as trainer.strategy.layer_classes=[...] with trainer=fsdp; "
                f"what it repeats is {', '.join(repeated) or 'nothing'}"
            )
        return found

    def end_sharding(self, module: nn.Module, without: Sequence[str] = ()) -> None:
        """Make what was trained inside of ``module`` plain models again, in the first process, on the CPU; what is
        called as in ``without`` stays. All processes call it."""
        for root in _roots(module, without):
            if isinstance(root, FSDPModule) and any(p.requires_grad for p in root.parameters()):
                end_root(root, keep=self.is_global_zero)

    # -------------------------------------------------------------------------------------------------- checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return Strategy.optimizer_state(self, optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if not self.save_async:
            return write_shards(checkpoint, Path(filepath))
        self.saved(wait=True)
        self._writers = self._writers or dist.new_group(backend="gloo")
        self._to_come = ShardsToCome(checkpoint, Path(filepath), self._writers)

    def saved(self, wait: bool) -> bool:
        """Whether the checkpoint that was saved last has its name on disk; ``wait`` until it has.

        All processes ask, the first one names it. Raises what kept one of them from writing."""
        if self._to_come is None or not (wait or self._to_come.there()):
            return self._to_come is None
        written, self._to_come = self._to_come, None
        written.place()
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Weights are read into their places; those of an optimizer where this strategy has one."""
        path = Path(checkpoint_path)
        if self.save_async:
            self.saved(wait=True)
            dist.barrier()
        if not path.is_dir():
            return self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        assert self.lightning_module is not None
        here = {"state_dict": self.lightning_module.state_dict(), "optimizer_states": []}
        here["optimizer_states"] = [optimizer.state_dict() for optimizer in self.optimizers]
        return read_shards(path, tensors_of(here), optimizers=bool(self.optimizers))

    def saved_weights(self, path: Path) -> dict[str, Tensor]:
        """The weights in a checkpoint, sharded as those in memory are, which stay as they are."""
        assert self.lightning_module is not None
        like = {"state_dict": {n: torch.empty_like(t) for n, t in self.lightning_module.state_dict().items()}}
        return read_shards(path, tensors_of(like), optimizers=False)["state_dict"]  # type: ignore[no-any-return]

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        like = self.lightning_module.state_dict()
        state = {name: _sharded(value, like.get(name)) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"]):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {key: _sharded(value, parameters[number]) for key, value in values.items()}
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def _cast(module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """``module``, what is not sharded of it in the ``dtype`` that it was to have; None: the one it has."""
    for parameter in module.parameters():
        if dtype is not None and not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(dtype)
    return module


def _roots(module: nn.Module, without: Sequence[str] = ()) -> Iterator[nn.Module]:
    """The models inside of a module, and what else has weights, outermost ones only; those ``without`` are left out."""
    for name, child in module.named_children():
        if name in without:
            continue
        own = next(child.parameters(recurse=False), None)
        if isinstance(child, PreTrainedModel | RewardTransformer | Critic) or own is not None:
            yield child
        else:
            yield from _roots(child)


def _sharded(value: Any, like: Tensor | None) -> Any:
    """Of a whole tensor this process's part, where ``like`` is sharded and of its shape."""
    if isinstance(value, DTensor) or not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
