"""How the models of a stage are computed, whichever stage it is: attention, products, activations, compilation."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.distributed._composable import checkpoint

from lit_rlhf.models import layers, use_onednn, use_own_attention
from lit_rlhf.models.micro_batches import LEARNING, trunks
from lit_rlhf.models.onednn import uses_onednn
from lit_rlhf.training.parts import fit_memory


class ModelSettings(Callback):
    """Sets up the models that a module holds, as the trainer's settings say; their weights and names stay.

    Args:
        activation_checkpointing: trained models keep only what enters each layer, and compute the rest again in the
            backward pass: less memory, a third more work, the same gradients.
        compile: trained models run through ``torch.compile``, layer by layer.
        onednn: on a CPU, float32 products of linear layers of at least so many inputs and outputs are oneDNN's: see
            :mod:`lit_rlhf.models.onednn`; None: of none.
        whole_last_layer: the MLP of the last layer computes all tokens, also where only the states of some are read.
        batched_attention: on a CPU, attention is computed by batched products rather than by PyTorch's scaled
            dot-product attention, which is then in float32 also where the rest is not: see
            :mod:`lit_rlhf.models.attention`.
        row_multiple: on a CPU, packed sequences and what is read of them are filled up to a multiple of so many tokens
            where products are oneDNN's: see :func:`lit_rlhf.models.onednn.rows_to_add`.
        kept_gib: GiB that forward passes may keep for their backward pass, logits apart. A batch for which they would
            keep more is learned in parts, whose gradients add up to its own.
    """

    def __init__(
        self,
        activation_checkpointing: bool = False,
        compile: bool = False,
        onednn: int | None = None,
        whole_last_layer: bool = False,
        batched_attention: bool = True,
        row_multiple: int = 32,
        kept_gib: float = LEARNING,
    ) -> None:
        self.activation_checkpointing, self.compile, self.onednn = activation_checkpointing, compile, onednn
        self.whole_last_layer, self.batched_attention = whole_last_layer, batched_attention
        self.row_multiple, self.kept_gib = row_multiple, kept_gib

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.apply(pl_module, on_cpu=trainer.strategy.root_device.type == "cpu")
        if trainer.datamodule is not None:
            fit_memory(trainer.datamodule, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            pl_module.zero_grad()  # Lightning would keep gradients until after the next forward pass

    def apply(self, module: nn.Module, on_cpu: bool) -> None:
        """Set up the models inside ``module``, which will run on a CPU or elsewhere; twice is as good as once."""
        if on_cpu and self.onednn is not None:
            use_onednn(module, self.onednn)
        for trunk in trunks(module):
            trunk.whole_last_layer, trunk.row_multiple = self.whole_last_layer, self.row_multiple
            trunk.kept_gib = self.kept_gib
            trunk.by_onednn = uses_onednn(trunk)
            if on_cpu:
                use_own_attention(trunk, self.batched_attention)
            if not any(p.requires_grad for p in trunk.parameters()):
                continue
            for layer in layers(trunk):  # Lightning sets up anew for each of validate, fit and test
                # transformers' own asks whether a layer is in training mode, which those of PPO never are.
                if self.activation_checkpointing and checkpoint.state(layer) is None:
                    checkpoint(layer)
                if self.compile and layer._compiled_call_impl is None:
                    layer.compile()  # in place: names in a checkpoint stay, and layers that are alike compile once
