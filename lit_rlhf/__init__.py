"""lit_rlhf: from a raw language model to a chat assistant, as PyTorch Lightning components."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from lit_rlhf.apps.loaded_run import LoadedRun

__version__ = "0.1.0"


def load(path: str | Path) -> LoadedRun:
    """A run's folder, for a notebook: its models, tokenizer, figures and tables."""
    from lit_rlhf.apps.loaded_run import LoadedRun

    return LoadedRun(path)
