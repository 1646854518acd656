"""No evaluation on what was trained on: each stage writes down its training prompts, and evaluation looks them up.

What is kept of a prompt is a fingerprint (16 hex digits, one per line), so that the file is small and tells nobody's
words. Pretraining text is not looked through: it has no prompts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning import LightningDataModule
from omegaconf import DictConfig

from lit_rlhf.errors import UserError
from lit_rlhf.files import damaged, read_text, write_text
from lit_rlhf.finished import check_unchanged, read_done
from lit_rlhf.pipeline.run_folder import input_paths, read_settings
from lit_rlhf.stages.stage import all_stages
from lit_rlhf.text.records import prompt_fingerprint, shown

FILE = "trained_prompts.txt"


def write_trained_prompts(stage: str, folder: Path, data: LightningDataModule) -> None:
    """Write down which prompts a stage has trained on, where it trains on prompts."""
    if all_stages()[stage].trains_on_prompts:
        prints = sorted({prompt_fingerprint(messages) for messages in data.trained_prompts()})
        write_text(folder / FILE, "".join(f"{line}\n" for line in prints))


def read_trained_prompts(folder: Path) -> set[str] | None:
    """Fingerprints of the prompts that the stage in ``folder`` has trained on; None where it does not say."""
    check_unchanged(folder / FILE)
    text = read_text(folder / FILE)
    prints = None if text is None else set(text.split())
    if prints and (not text.endswith("\n") or any(not re.fullmatch("[0-9a-f]{16}", each) for each in prints)):
        raise damaged(folder / FILE, "lines of 16 hex digits were expected")
    return prints


def check_trained(stage: str, settings: DictConfig, data: Any) -> dict[str, int]:
    """Stage folder -> how many of the prompts to be evaluated it has trained on, for all that the models came from.

    Raises ``UserError`` where there are any, unless ``allow_trained``."""
    held_out = {prompt_fingerprint(messages): messages for messages in data.evaluated_prompts()}
    seen: dict[str, set[str]] = {}
    models = [Path(path) for _, path in input_paths(stage, settings)]
    for folder in trained_stages([model for model in models if model.exists()]):  # one that is not there is left out
        if (prints := read_trained_prompts(folder)) is not None:
            seen[str(folder)] = held_out.keys() & prints
        elif folder.name in all_stages() and all_stages()[folder.name].trains_on_prompts:  # by an older version
            print(f"{stage}: {folder} does not say which prompts it was trained on, so that was not checked")
    leaked = {folder: prints for folder, prints in seen.items() if prints}
    if leaked:
        everywhere = set().union(*leaked.values())
        where = ", ".join(f"{len(prints)} in {_place(Path(folder))}" for folder, prints in leaked.items())
        found = (
            f"{len(everywhere)} of {len(held_out)} prompts to be evaluated on were trained on: {where}; "
            f"one is {shown(held_out[min(everywhere)])[:80]!r}"
        )
        if not settings.allow_trained:
            raise UserError(
                f"{stage}: {found}. Take them out, evaluate on others ({stage}.data.path=), or set "
                f"{stage}.allow_trained=true"
            )
        print(f"{stage}: {found} ({stage}.allow_trained=true)")
    return {folder: len(prints) for folder, prints in leaked.items()}


def trained_stages(models: list[Path]) -> Iterator[Path]:
    """The folders of all stages behind model folders of runs, as each stage's ``inputs`` tell, each once."""
    todo, seen = list(models), set[Path]()
    while todo:
        folder = todo.pop(0).resolve().parent
        if folder in seen:
            continue
        seen.add(folder)
        yield folder
        inputs = read_done(folder).get("inputs", {})  # of a model from elsewhere nobody knows
        todo += [folder.parent / path for path in inputs if Path(path).name in ("model", "adapter")]


def _place(folder: Path) -> str:
    """A stage and the file that it was trained on."""
    data = read_settings(folder).get(folder.name, {}).get("data") or {}
    source = data.get("path") or "the built-in world"
    return f"{folder.name} ({source}; {folder})"
