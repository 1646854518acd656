"""Setup of the models of any stage: kernels, checkpointing, compilation, memory."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.distributed._composable import checkpoint

from lit_rlhf.errors import say_once
from lit_rlhf.models.kernels import Kernels, use_block_attention, use_fast_layers, use_kernels
from lit_rlhf.models.micro_batches import LEARNING, backbones, limit_kept
from lit_rlhf.models.policy import layers
from lit_rlhf.training.parts import DataInParts


class ModelSettings(Callback):
    """Sets up the models that a module holds, as the trainer's settings say; their weights and names stay.

    Args:
        kernels: "fast": computed by :mod:`lit_rlhf.models.kernels`; "plain": by transformers' own modules.
        activation_checkpointing: trained models keep only what enters each layer, and compute the rest again in the
            backward pass: less memory, a third more work, the same gradients.
        compile: trained models run through ``torch.compile``, layer by layer.
        kept_gib: GiB that forward passes may keep for their backward pass, logits apart. A batch for which they would
            keep more is learned in parts, whose gradients add up to its own.
    """

    def __init__(
        self,
        kernels: Kernels = "fast",
        activation_checkpointing: bool = False,
        compile: bool = False,
        kept_gib: float = LEARNING,
    ) -> None:
        self.kernels, self.kept_gib = kernels, kept_gib
        self.activation_checkpointing, self.compile = activation_checkpointing, compile

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.apply(pl_module, on_cpu=trainer.strategy.root_device.type == "cpu")
        if isinstance(trainer.datamodule, DataInParts):
            trainer.datamodule.fit_memory(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trained = {p.dtype for p in pl_module.parameters() if p.requires_grad}
        for dtype in trained & {torch.bfloat16, torch.float16}:
            kind, lost = str(dtype).removeprefix("torch."), torch.finfo(dtype).eps / 2
            say_once(
                f"weights are trained in {kind}: of each step, what is below {lost:.1g} of a weight is lost to "
                "rounding; trainer.precision=bf16-mixed keeps them in float32"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            pl_module.zero_grad()  # Lightning would keep gradients until after the next forward pass

    def apply(self, module: nn.Module, on_cpu: bool) -> None:
        """Set up the models inside ``module``, which will run on a CPU or elsewhere; twice is as good as once."""
        use_kernels(self.kernels)
        if self.kernels == "fast":
            use_fast_layers(module, on_cpu)
        for backbone in backbones(module):
            limit_kept(backbone, self.kept_gib)
            if on_cpu and self.kernels == "fast":
                use_block_attention(backbone)
            if not any(p.requires_grad for p in backbone.parameters()):
                continue
            for layer in layers(backbone):  # Lightning sets up anew for each of validate, fit and test
                # transformers' own asks whether a layer is in training mode, which those of PPO never are.
                if self.activation_checkpointing and checkpoint.state(layer) is None:
                    checkpoint(layer)
                if self.compile and layer._compiled_call_impl is None:
                    layer.compile()  # in place: names in a checkpoint stay, and layers that are alike compile once
