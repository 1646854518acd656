"""Precision of a model's computation."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """Precision of matrix products: autocast's where it is on, else the model's own."""
    kind = model.device.type.replace("meta", "cpu")  # tensors without numbers have no autocast of their own
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
