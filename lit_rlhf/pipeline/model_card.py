"""``README.md`` of an exported model: what it is made of, as the Hub and people read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from omegaconf import DictConfig

import lit_rlhf
from lit_rlhf.apps.run_reader import numbers
from lit_rlhf.errors import first_line, say
from lit_rlhf.files import write_text
from lit_rlhf.finished import CARD
from lit_rlhf.pipeline.run_folder import input_paths
from lit_rlhf.pipeline.stage_folder import StageFolder
from lit_rlhf.stages.stage import all_stages


def write_cards(cfg: DictConfig, folder: StageFolder, figures: dict[str, Any]) -> None:
    """Write a card into each folder of weights that a stage has exported: lineage, data, figures, licence."""
    if places := [place for name in ("model", "adapter") if (place := folder.path / name).is_dir()]:
        card = card_of(cfg, folder, figures)
        for place in places:
            write_text(place / CARD, card)


def card_of(cfg: DictConfig, folder: StageFolder, figures: dict[str, Any]) -> str:
    """The text of the card: what the Hub reads at its head (YAML), then tables."""
    base = folder.settings["origin"]["checkpoint"]
    head = ModelCardData(
        license=_licence(base), library_name="transformers", tags=["lit_rlhf", folder.stage],
        base_model=base if base and not Path(base).exists() else None, ignore_metadata_errors=True,
    )  # fmt: skip
    settings = folder.settings[folder.stage]
    made = {
        "stage": f"{folder.stage} ({all_stages()[folder.stage].title})",
        "run": cfg.run,
        **{
            f"`{address}`": _short(path)
            for address, path in input_paths(folder.stage, settings)
            if ".data" not in address
        },
        **({"checkpoint that the run began with": _short(base)} if base else {}),
        "data": _data(settings["data"]),
        "seed": settings["seed"],
        "recipe": cfg.recipe,
        "made with": f"lit_rlhf {lit_rlhf.__version__}",
    }
    flat = {
        address: f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
        for address, value in numbers({name: value for name, value in figures.items() if name != "by"}).items()
    }
    return (
        f"---\n{head.to_yaml()}\n---\n\n# {cfg.run}/{folder.stage}\n\n{_table('made of', made)}\n"
        f"All settings are in `config.yaml` beside this folder.\n\n{_table('figure', flat)}"
    )


def _licence(base: str | None) -> str | None:
    """The licence that the card of a base's folder names."""
    file = Path(base or "") / CARD
    if not base or not file.is_file():
        return None
    try:
        licence: str | None = ModelCard.load(file, ignore_metadata_errors=True).data.get("license")
    except Exception as error:  # YAML's and the Hub's kinds; the model that was trained is none the worse
        say(f"{file}: no card that can be read ({first_line(error)}); the licence is left out of the new one")
        return None
    return licence


def _data(settings: dict[str, Any]) -> str:
    paths = settings.get("path") or settings.get("feedback")
    if paths is None:
        return "the built-in world" if "World" in settings["_target_"] else settings["_target_"].rpartition(".")[2]
    return ", ".join(map(_short, paths if isinstance(paths, list) else [paths]))


def _short(path: Any) -> str:
    """A path without what is above a run, or above a file: that is nobody's business."""
    if isinstance(path, dict):
        path = path.get("path")
    parts = Path(str(path)).parts
    if parts[-1:] == ("model",) and len(parts) > 2:
        return "/".join(parts[-3:-1])
    return parts[-1] if Path(str(path)).is_absolute() else str(path)


def _table(title: str, rows: dict[str, Any]) -> str:
    lines = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return f"| {title} | |\n|---|---|\n{lines}"
