"""Model folders: written whole or not at all."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from lit_rlhf.errors import UserError, say
from lit_rlhf.files import disk, final
from lit_rlhf.models.adapters import merged
from lit_rlhf.models.finite import not_finite
from lit_rlhf.models.loading import CheckpointFormat, checkpoint_format, listed, weight_files
from lit_rlhf.text.chat import turn_end

OLD = ".old"


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a Hugging Face folder (safetensors, config, tokenizer, template) under a temporary name, then rename.

    Adapters are merged into the weights: what is written is a plain model. Of one that was loaded, precision and
    generation settings are the checkpoint's, to which the token is added with which the template ends a turn."""
    with written_whole(folder) as temporary:
        plain = merged(model)
        _write(plain, temporary)
        tokenizer.save_pretrained(temporary)
        if isinstance(plain, PreTrainedModel) and plain.can_generate():
            _name_end(plain, tokenizer, temporary, folder)


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder to write into, which takes the place of ``folder`` when all is written."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with disk(folder):
        temporary.mkdir(parents=True)
        yield temporary
    put_in_place(temporary, folder)


def put_in_place(new: Path, folder: Path) -> None:
    """Rename a folder to ``folder``; one that is there is exchanged for it in one step where the file system can, else
    in two, and then removed, under a name that ends in ``OLD``."""
    old = folder.with_name(folder.name + OLD)
    shutil.rmtree(old, ignore_errors=True)
    with disk(folder):
        if folder.exists() and _swapped(new, folder):
            new.rename(old)
        else:
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _swapped(one: Path, other: Path) -> bool:
    """Whether two names were exchanged: Linux and macOS can, on most of their file systems, and Python has no word."""
    if os.name != "posix":
        return False
    system, names = ctypes.CDLL(None), (os.fsencode(one.absolute()), os.fsencode(other.absolute()))
    if hasattr(system, "renameat2"):
        return bool(system.renameat2(-1, names[0], -1, names[1], 2) == 0)  # RENAME_EXCHANGE
    return hasattr(system, "renamex_np") and bool(system.renamex_np(*names, 2) == 0)  # RENAME_SWAP


def _write(model: PreTrainedModel, folder: Path) -> None:
    form = checkpoint_format(model)
    if form is None:
        model.save_pretrained(folder)
        return
    own = getattr(model, "generation_config", None)
    try:
        if own is not None:  # the file is copied: transformers refuses to write some of those that it reads
            model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        stored = _as_stored(model, form)
        if beyond := next((name for name, weight in stored.items() if not_finite(weight)), None):
            dtype = _plain(stored[beyond].dtype)
            say(f"{folder.parent}: written in float32, for {beyond} holds numbers beyond {dtype}'s")
            form = replace(form, dtype=torch.float32, others={})
            stored = _as_stored(model, form)
        lost = rounded_back(model, stored, form)
        if lost > 0.5:
            say(
                f"{folder.parent}: rounding to {_plain(form.dtype)} takes back {lost:.0%} of the numbers that training "
                "changed; export_dtype=float32 keeps them"
            )
        model.save_pretrained(folder, state_dict=stored)
    finally:
        if own is not None:
            model.generation_config = own
    generation = folder / "generation_config.json"
    if generation.exists() and form.generation is None:
        generation.unlink()
    elif generation.exists() and form.generation is not None:
        generation.write_text(form.generation, encoding="utf-8")
    _name_dtype(folder / "config.json", _plain(form.dtype))


def _name_end(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, written: Path, folder: Path) -> None:
    """Let other tools stop where the chat template ends the assistant's turn, as our own sampling does."""
    try:
        end = turn_end(tokenizer)
    except UserError:  # a template that can write no answer has taught no end; whoever uses it hears of it
        return
    file = written / "generation_config.json"
    if file.exists():
        settings = json.loads(file.read_text(encoding="utf-8"))
    else:  # what other tools derive from config.json then
        settings = GenerationConfig.from_model_config(model.config).to_diff_dict()
    known = listed(settings.get("eos_token_id")) or listed(getattr(model.config, "eos_token_id", None))
    if new := sorted(end - {*known}):
        names = ", ".join(tokenizer.convert_ids_to_tokens(new))
        where = f"{final(folder.parent)}: generation_config.json"
        say(f"{where} names {names} as an end of answers, too: the template writes it")
        settings["eos_token_id"] = [*known, *new]
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _as_stored(model: PreTrainedModel, form: CheckpointFormat) -> dict[str, Tensor]:
    """The weights in the precision of the checkpoint; those that are tied stay so."""
    cast: dict[tuple[int, torch.dtype], Tensor] = {}
    stored, weights = {}, model.state_dict()
    renamed = not form.others.keys() <= weights.keys()
    for name, weight in weights.items():
        names = _names_in_files(model, name, weight) if renamed else [name]
        dtype = next((form.others[n] for n in names if n in form.others), form.dtype)
        dtype = dtype if weight.is_floating_point() else weight.dtype
        stored[name] = cast.setdefault((weight.data_ptr(), dtype), weight.to(dtype))
    return stored


def _names_in_files(model: PreTrainedModel, name: str, weight: Tensor) -> set[str]:
    """What checkpoints may call a tensor of ``model``: with and without the backbone's prefix, of ours or theirs."""
    backbone: Any = model.base_model
    own = name.removeprefix(f"{model.base_model_prefix}.")
    written = revert_weight_conversion(backbone, {own: weight.to("meta")})  # as transformers writes it
    return {name, own, *written, *(f"{backbone.base_model_prefix}.{n}" for n in written)}


def rounded_back(model: torch.nn.Module, stored: dict[str, Tensor], form: CheckpointFormat) -> float:
    """Of the numbers that differ from the checkpoint's, the share that equal them again as they are ``stored``.

    Tensors that the checkpoint has under another name or in another shape do not count."""
    changed = equal = 0
    weights = model.state_dict()
    for file in filter(Path.is_file, weight_files(form.folder)):
        with safe_open(file, "pt") as before:
            for name in weights.keys() & set(before.keys()):
                now, rounded = weights[name], stored[name]
                if rounded.dtype == now.dtype or list(now.shape) != before.get_slice(name).get_shape():
                    continue
                old = before.get_tensor(name).to(now.device, now.dtype)
                moved = now != old
                changed += int(moved.sum())
                equal += int((moved & (rounded.to(now.dtype) == old)).sum())
    return equal / changed if changed else 0.0


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _name_dtype(file: Path, dtype: str) -> None:
    settings = json.loads(file.read_text(encoding="utf-8"))
    for node in (settings, *settings.values()):  # a reward model with a head of its own has the config of its backbone
        if isinstance(node, dict) and "dtype" in node:
            node["dtype"] = dtype
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def fingerprint(folder: Path) -> str:
    """SHA-256 of a model folder's weights, 16 hex digits; of nothing where it holds none."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def identity(folder: Path) -> str:
    """16 hex digits that tell one model from another by its weights, in whatever precision they are written.

    Of each tensor its shape and its first row, rounded to bfloat16: read in no time, however large the model."""
    digest = hashlib.sha256()
    for file in sorted(filter(Path.is_file, weight_files(folder))):
        with torch.device("cpu"), safe_open(file, "pt") as tensors:  # on meta, too, where a plan is made
            for name in sorted(tensors.keys()):
                tensor = tensors.get_slice(name)
                shape = tensor.get_shape()
                row = (tensor[:1] if len(shape) > 1 else tensor[:]).to(torch.bfloat16)
                digest.update(f"{name} {shape}".encode())
                digest.update(row.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
