"""The contract between a stage and the pipeline that runs it.

Protocols: a stage's module is any LightningModule, its data any LightningDataModule, that have these methods.
:class:`lit_rlhf.stages.records.FileDataModule` and those that inherit from it have all that is asked of data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.rollouts.engine import Engine
from lit_rlhf.text.records import Messages, Moved


@runtime_checkable
class StageModule(Protocol):
    """A LightningModule that a stage runs.

    The pipeline makes it from the settings ``<stage>.module``, with the models that the stage's record names and what
    its data hand it (:meth:`StageData.for_module`) as keyword arguments. Then it calls Lightning's fit (and validate),
    predict or test, as ``<stage>.run`` says, and in the main process, in this order:"""

    def export(self, folder: Path) -> None:
        """Write what came out below the stage's ``folder``: a trained model to ``model/``, where later stages look."""
        ...

    def figures(self) -> dict[str, Any]:
        """Headline figures, for ``done.json`` and the report: numbers, text, lists and dicts of them; None: unknown."""
        ...


@runtime_checkable
class WritesSamples(Protocol):
    """A module that shows what its model writes while it is trained; asked where ``<stage>.samples_every`` is set."""

    def write_samples(self) -> list[tuple[str, str]]:
        """(prompt, text) pairs by the model as it is now; they go to ``samples.jsonl``, the terminal and the report."""
        ...


@runtime_checkable
class StageData(Protocol):
    """A LightningDataModule that a stage reads.

    The pipeline sets ``moved`` and ``tell``, calls ``prepare_data`` and ``setup``, loads the models with the tokenizer,
    and asks:"""

    tokenizer: PreTrainedTokenizerBase | None  # what the models are loaded with; None: they read no tokens of it
    moved: Moved  # prompts that the run has moved between training and test
    tell: Callable[[str], None]  # how something is said to a person
    skipped: Sequence[str]  # a line for each bad record
    long: int  # records that were too long
    how_long: str  # how long that is, and what became of them: "longer than max_length=512 tokens (skipped)"

    def sizes(self) -> dict[str, int]:
        """What was read, by name: ``{"train_set": 8000, "val_set": 400}``."""
        ...

    def for_module(self) -> dict[str, Any]:
        """Keyword arguments of the stage's module that come from its data: the tokenizer, a judge, labels."""
        ...


@runtime_checkable
class TrainsOnPrompts(Protocol):
    """Data of a stage that trains on prompts (``Stage.trains_on_prompts``)."""

    def trained_prompts(self) -> Iterable[Messages]:
        """The prompts that are trained on; a fingerprint of each is kept, and evaluation on them refused."""
        ...


@runtime_checkable
class EvaluatesPrompts(Protocol):
    """Data of a stage that tests on prompts; asked where ``<stage>.allow_trained`` is set."""

    def evaluated_prompts(self) -> Iterable[Messages]:
        """The prompts that no model of the stage may have been trained on."""
        ...


@runtime_checkable
class SamplesResponses(Protocol):
    """A module that samples responses; ``stage=plan`` puts an engine without values in the place of its own."""

    engine: Engine


@runtime_checkable
class Shards(Protocol):
    """A module whose models may be sharded, as those of :class:`lit_rlhf.training.trained_state.TrainedState`."""

    def end_sharding(self) -> None:
        """Make what is exported plain models in the main process; all processes call it, sharded or not."""
        ...


@runtime_checkable
class Planned(Protocol):
    """Protocol of modules whose memory ``stage=plan`` measures: those of the pipeline and of stages that align."""

    def dry_run(self, meter: Any, data: Any) -> list[dict[str, Any]] | None:
        """Do once what takes most memory, inside of a :class:`lit_rlhf.training.Meter`, with models without values.

        Returns records such as the stage would collect, where another stage reads them."""
        ...


def check_contract(made: Any, contract: type, address: str) -> None:
    """Raise ``UserError`` where an object, made from the setting ``address``, lacks something of a protocol."""
    names = {name for kind in contract.__mro__ for name in (*vars(kind), *vars(kind).get("__annotations__", ()))}
    if missing := sorted(name for name in names if not name.startswith("_") and not hasattr(made, name)):
        raise UserError(
            f"{address}: a {type(made).__name__} has no {', '.join(missing)}; see lit_rlhf.stages.contract."
            f"{contract.__name__}"
        )
