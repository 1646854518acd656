"""Modules of transformers' models that are exchanged for faster ones with the same weights and names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.activations import GELUTanh as PlainGELU, NewGELUActivation
from transformers.pytorch_utils import Conv1D

from lit_rlhf.models.kernels.gelu import GELUTanh
from lit_rlhf.models.kernels.onednn import OneDNNConv1D, OneDNNLinear, multiplies


def use_fast_layers(module: nn.Module, on_cpu: bool) -> None:
    """Exchange what is faster otherwise inside of ``module``; parameters stay the same objects under the same names.

    ``gelu_new`` for :class:`GELUTanh`; of what will run ``on_cpu``, wide linear layers for those of
    :mod:`lit_rlhf.models.kernels.onednn`.
    A layer with hooks stays: they are somebody's. Each new module computes as the old one with ``kernels=plain``."""
    new: dict[nn.Module, nn.Module] = {}  # a module that stands in several places stays one
    for parent in list(module.modules()):
        if isinstance(parent, GELUTanh):
            continue
        for name, child in list(parent.named_children()):
            if child not in new:
                new[child] = _faster(child, on_cpu)
            if new[child] is not child:
                parent.register_module(name, new[child])


def _faster(layer: Any, on_cpu: bool) -> Any:
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return layer
    if type(layer) in (NewGELUActivation, PlainGELU):
        return GELUTanh(layer).train(layer.training)
    if not on_cpu or type(layer) not in (nn.Linear, Conv1D) or not multiplies(layer.weight):
        return layer
    with torch.device("meta"):
        own: Any
        if isinstance(layer, Conv1D):
            own = OneDNNConv1D(layer.nf, layer.nx)  # type: ignore[no-untyped-call]
        else:
            own = OneDNNLinear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    own.weight, own.bias = layer.weight, layer.bias
    return own.train(layer.training)
