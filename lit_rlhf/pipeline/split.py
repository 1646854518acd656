"""What a run remembers of its split: which prompts changed sides, and which were trained on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig
from pydantic import Field

from lit_rlhf.files import Checked, read_json, write_json
from lit_rlhf.pipeline.run_folder import lineage
from lit_rlhf.pipeline.trained_prompts import FILE as TRAINED, read_trained_prompts, trained_stages
from lit_rlhf.text.records import Moved

FILE = "split.json"


class Sides(Checked):
    """Fingerprints of the prompts that changed sides."""

    held_out: list[str] = Field(default_factory=list)
    train: list[str] = Field(default_factory=list)


def remembered_split(cfg: DictConfig, stage: str, allow_trained: bool | None = None) -> Moved:
    """The prompts that changed sides in this run or in one that it starts from, by fingerprint, and, unless
    ``allow_trained``, all that were trained on there, but by this ``stage`` of this run itself; None: it has no such
    setting."""
    way = "" if allow_trained is None else f", or set {stage}.allow_trained=true"
    moved, own = Moved(or_else=way), (Path(cfg.paths.run_dir) / stage).resolve()
    for run in _runs(cfg):
        known = read_json(run / FILE, Sides)
        # What this run says comes first: it took over what it knew of the others.
        moved.held_out |= set(known.get("held_out", ())) - moved.train
        moved.train |= set(known.get("train", ())) - moved.held_out
        models = [file.parent / "model" for file in [*run.glob(f"*/{TRAINED}"), *run.glob(f"rounds/*/*/{TRAINED}")]]
        for folder in trained_stages([] if allow_trained else models):
            if folder != own and (prints := read_trained_prompts(folder)):
                moved.trained |= prints
                moved.trained_by.append(os.path.relpath(folder))
    return moved


def remember_split(cfg: DictConfig, moved: Moved) -> None:
    """Write down which prompts changed sides, for the stages to come and the runs that start from this one."""
    if moved.held_out or moved.train:
        said = {"held_out": sorted(moved.held_out), "train": sorted(moved.train)}
        write_json(_home(Path(cfg.paths.run_dir)) / FILE, said)


def _runs(cfg: DictConfig) -> Iterator[Path]:
    first, *behind = lineage(cfg)
    yield from dict.fromkeys(map(_home, [first, Path(cfg.paths.runs) / cfg.run, *behind]))


def _home(run: Path) -> Path:
    """The folder of a run; of one of its rounds, that of them all."""
    return run.parent.parent if run.parent.name == "rounds" else run
