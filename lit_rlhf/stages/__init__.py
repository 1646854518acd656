"""The stages: each a LightningModule with its LightningDataModule, and a record of what it is.

``from lit_rlhf.stages import PPOModule, PPODataModule``: the classes that the records name, imported when asked for."""

from importlib import import_module
from typing import Any

from lit_rlhf.stages.stage import Stage, all_stages


def _places() -> dict[str, str]:
    """Class -> the module of this package that has it."""
    paths = [path for stage in all_stages().values() for path in (stage.module, *stage.data)]
    return {path.rpartition(".")[2]: path.rpartition(".")[0] for path in paths if path.startswith(f"{__name__}.")}


def __dir__() -> list[str]:
    return [Stage.__name__, all_stages.__name__, *_places()]


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return __dir__()
    if name.endswith("Module") and name in (places := _places()):
        return getattr(import_module(places[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
