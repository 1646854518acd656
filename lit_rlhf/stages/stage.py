"""The record of a stage: everything that other layers know of it they read here.

Imports no torch, so that settings are checked, and ``--help`` is answered, before torch is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, Literal, NamedTuple

from lit_rlhf.errors import UserError

GROUP = "lit_rlhf.stages"  # entry points of other distributions that name a Stage
SFT_STD = "SFT std"  # unit of the reward model's scores; PPO says in which unit its own are
Tone = Literal["grey", "blue", "orange", "green", "violet", "teal", "pink", "amber"]  # colours of the pages
GRADES = "\N{MINUS SIGN}1 to 1"  # unit of the gold judge's grades of one aspect


class Panel(NamedTuple):
    """A small chart of some metrics of a stage."""

    title: str
    unit: str  # "%": shares, drawn as percentages
    lines: Mapping[str, str]  # metric -> its label
    reference: tuple[float, str] | None = None  # a level to compare with
    folded: bool = False  # shown on demand


def loss_panel(stage: str, unit: str) -> Panel:
    """The loss of a stage in training and on held-out data."""
    return Panel("Loss", unit, {f"{stage}/loss": "training", f"val/{stage}/loss": "held out"})


def accuracy_panel(stage: str) -> Panel:
    """Share of pairs that are ranked right."""
    lines = {f"{stage}/accuracy": "training", f"val/{stage}/accuracy": "held out"}
    lines[f"val/{stage}/gold_accuracy"] = "held out, by gold"
    return Panel("Pairs ranked right", "%", lines, (0.5, "chance"))


def rate_panel(stage: str) -> Panel:
    """The learning rate of a stage."""
    return Panel("Learning rate", "", {f"{stage}/lr": "schedule"})


class Card(NamedTuple):
    """A headline figure; ``value`` and ``note`` are templates (see :class:`Stage`)."""

    label: str
    value: str
    note: str


class Section(NamedTuple):
    """A section of the report with a stage's charts, and with what a watch on it has found (``health.jsonl``)."""

    heading: str
    about: str
    more: str  # what the folded charts are about


class Model(NamedTuple):
    """A model on the pages, where evaluation has several side by side."""

    name: str  # what evaluation calls it
    title: str
    tone: Tone = "grey"


class RoundFigure(NamedTuple):
    """A row of the table of rounds."""

    label: str
    unit: str
    address: str  # below the stage's figures


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage: what runs it, which models and data it takes from which stage, and how the report shows it.

    Templates are format strings of the stage's figures: ``{val_loss}`` a number, ``{accuracy:%}`` a percentage,
    ``{val_loss:change}`` from ``val_loss_first`` to ``val_loss``. What stands in ``[...]`` is left out where one of its
    figures is missing, and the whole template where another one is."""

    name: str  # of its settings, its folder in a run, its metrics
    title: str
    order: int  # stages run in ascending order
    module: str  # dotted name of its LightningModule, which follows lit_rlhf.stages.contract.StageModule
    data: tuple[str, ...]  # dotted names of its LightningDataModules; see lit_rlhf.stages.contract.StageData
    objective: str  # address, below its figures, of the one that a sweep optimizes; {policy}: see ``aligns``

    # What it needs. Settings that build a model -> the stage that the model comes from; None: it is made here. The
    # first one is trained. "policies.sft" is one of several models.
    models: Mapping[str, str | None] = field(default_factory=lambda: {"policy": None})
    at_least: str | None = None  # the model that must be there, the others may be missing; None: all must be there
    data_from: str | None = None  # the stage whose records (data/ of a run) it reads

    # What it is to others.
    in_pipeline: bool = False  # part of stage=pipeline
    aligns: bool = False  # trains a policy on preferences, to be compared with the SFT model
    trains_on_prompts: bool = False  # evaluation refuses the prompts that it was trained on
    replaced_by_checkpoint: bool = False  # a checkpoint (model.path) takes the place of what it makes
    skipped_for_checkpoint: bool = False  # where it was not run, later stages start from the checkpoint that it would
    learns_from: tuple[str, ...] = ()  # modes of the labelling page whose records it is trained on
    per_round: tuple[RoundFigure, ...] | None = None  # rows of the table of rounds; None: it is not part of a round
    settings: Path | None = None  # the folder that holds <name>/default.yaml; None: this package's conf/

    # The report.
    panels: tuple[Panel, ...] = ()
    x_axis: tuple[str, str] | None = None  # (metric, its label) that curves are drawn against; None: optimizer steps
    model: Model | None = None  # what it makes, where that is evaluated beside others
    own_section: bool = False  # the report tells of it in a place of its own; else it is shown among the stages
    section: Section | None = None  # its charts in a section of their own; own_section is True then
    glossary: tuple[tuple[str, str], ...] = ()  # (term, what it means): below the page, where the stage has begun
    note: str = ""  # template: what it reached, in a few words
    headline: str = ""  # template: the same as a sentence, the main figure between **; the page has the last stage's
    cards: tuple[Card, ...] = ()  # the first that has its figures is shown
    in_sweeps: tuple[str, ...] = ()  # addresses of figures in a sweep's table, beside the objective

    @property
    def called(self) -> str:
        """What evaluation calls its model."""
        return self.name if self.model is None else self.model.name

    @property
    def trained(self) -> str:
        """The setting of the model that is trained, or asked."""
        return self.model_settings[0]

    @property
    def model_settings(self) -> list[str]:
        """The settings that build its models, each a model or several by name."""
        return list(dict.fromkeys(setting.partition(".")[0] for setting in self.models))


@cache
def all_stages() -> dict[str, Stage]:
    """Every stage by name, in the order in which they run: those of this package (a folder with a record each), and
    those that other distributions name as entry points of the group ``lit_rlhf.stages``."""
    package = __name__.rpartition(".")[0]
    folders = [found.name for found in iter_modules(import_module(package).__path__) if found.ispkg]
    found = [import_module(f"{package}.{name}").STAGE for name in folders]
    for point in entry_points(group=GROUP):
        try:
            found.append(point.load())
        except Exception as error:  # of somebody's module, of any kind
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"stage {point.name} ({point.value}) cannot be imported: {reason}") from None
        if not isinstance(found[-1], Stage):
            raise UserError(f"stage {point.name}: {point.value} is a {type(found[-1]).__name__}, no lit_rlhf Stage")
    names = [stage.name for stage in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"two stages are called {twice[0]!r}; one of the entry points of {GROUP} must go by another name"
        )
    return {stage.name: stage for stage in sorted(found, key=lambda stage: (stage.order, stage.name))}


def exports(stage: Stage, **names: str) -> tuple[Callable[[str], Any], list[str]]:
    """``__getattr__`` and ``__all__`` of a stage's package: its module and data, and submodule="Name Other".

    They are imported when they are asked for: the record beside them is read before torch is imported."""
    package = stage.module.rpartition(".")[0].rpartition(".")[0]
    paths = [stage.module, *stage.data]
    paths += [f"{package}.{module}.{name}" for module, line in names.items() for name in line.split()]
    places = {name: module for module, _, name in (path.rpartition(".") for path in paths)}

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(places[name]), name)

    return get, ["STAGE", *places]
