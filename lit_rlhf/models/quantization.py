"""Frozen weights in 4 bits (QLoRA, arXiv:2305.14314), by bitsandbytes: adapters are trained on top of them."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lit_rlhf.errors import UserError

Quantization = Literal["4bit"]
Model = TypeVar("Model", bound=nn.Module)


def quantized_loading(quantization: Quantization | None, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for weights in NF4 whose products are computed in ``dtype``.

    Heads and embeddings keep their precision. Raises ``UserError`` where bitsandbytes is not installed."""
    if quantization is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "quantization=4bit needs the package bitsandbytes: pip install 'lit_rlhf[quantization]'; or set it to null"
        )
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
            llm_int8_skip_modules=["lm_head", "score", "embed_out"],
        )
    }


def keep_layout(model: Model) -> Model:
    """Let the weights of a ``model`` stay as they were read.

    On some CPUs bitsandbytes 0.50 lays them out anew in the first pass in evaluation mode, with less precise scales and
    without gradients: a policy in PPO is in that mode, and its reference would change."""
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def is_quantized(module: nn.Module) -> bool:
    """Whether there are weights of a few bits inside of ``module``."""
    return any(_state(p) is not None for p in module.parameters())


def plain_weight(module: Any) -> Tensor:
    """The weight of a module as numbers: dequantized where it is of a few bits."""
    weight: Tensor = module.weight
    state = _state(weight)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)


def _state(parameter: Tensor) -> Any:
    """How a quantized parameter is read; None for a plain one."""
    return getattr(parameter, "quant_state", None)
