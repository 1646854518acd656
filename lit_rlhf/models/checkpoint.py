"""Model folders: written whole or not at all."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.models.lora import merged


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a Hugging Face folder (safetensors, config, tokenizer, template) under a temporary name, then rename.

    Adapters are merged into the weights: what is written is a plain model."""
    temporary, old = (folder.with_name(folder.name + ending) for ending in (".tmp", ".old"))
    for left_over in (temporary, old):
        shutil.rmtree(left_over, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        merged(model).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another paths.runs") from error
    if folder.exists():
        folder.rename(old)  # removed only after the new one stands: removing takes a while, and may be interrupted
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def fingerprint(folder: Path) -> str:
    """SHA-256 of a model folder's weights, 16 hex digits; of nothing where it holds none."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]
