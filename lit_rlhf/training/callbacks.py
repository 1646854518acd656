"""Callbacks of every stage: a check of the first steps, text samples, a progress bar."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import WandbLogger
from pydantic import Field
from tqdm import tqdm

from lit_rlhf.errors import TrainingDiverged, printable
from lit_rlhf.training.fsdp import FSDP2
from lit_rlhf.training.metrics_file import append_rows
from lit_rlhf.training.parts import LearnsInParts

Item = TypeVar("Item")
SLOW_STEP = 1.0  # seconds after which a bar is brought up to date at the next step


class FirstSteps(Callback):
    """Reports in one line where a loss rises past the one before training, and which setting to change.

    The bar is the loss of the validation before the first step, or that of the first step where it is higher: its batch
    may be harder. Training is above the bar when nine in ten of the last ``window`` steps are, and their mean by
    ``margin``; a later validation, which reads the same records, when it is by a fifth of that.

    Args:
        stage: whose ``val/<stage>/loss`` is read.
        window: steps averaged.
        margin: fraction of the first loss.
        stop: end the training there, by :class:`TrainingDiverged`.
    """

    def __init__(
        self,
        stage: str,
        window: Annotated[int, Field(ge=2)] = 10,
        margin: Annotated[float, Field(gt=0)] = 0.1,
        stop: bool = False,
    ) -> None:
        self.stage, self.window, self.margin, self.stop = stage, window, margin, stop
        self.first: float | None = None  # validation loss before training
        self.begun: float | None = None  # training loss of the first step
        self.losses: list[float] = []  # of the last steps
        self.finding: str | None = None

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("first", "begun", "losses", "finding")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = trainer.callback_metrics.get(f"val/{self.stage}/loss")
        if loss is None or trainer.sanity_checking:
            return
        if trainer.global_step == 0:
            self.first = loss.item()
        elif self.first is not None and loss > self.first * (1 + self.margin / 5):
            recent = self._recent()
            learned = recent is not None and recent < self.first
            cure = (
                f"while that of training fell to {recent:.3g}: the records are learned by heart; set fewer "
                f"{self.stage}.trainer.max_epochs, or a lower {self.stage}.optimizer.lr"
                if learned
                else f"the steps undo what the model knew; set a lower {self.stage}.optimizer.lr"
            )
            self._say(trainer, f"is {loss.item():.3g} at step {trainer.global_step}: {cure}")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        loss = pl_module.latest_loss if isinstance(pl_module, LearnsInParts) else None
        if loss is None or self.first is None or self.finding is not None:
            return
        self.begun = loss.item() if self.begun is None else self.begun
        self.losses = [*self.losses, loss.item()][-self.window :]
        recent, bar = self._recent(), max(self.first, self.begun)
        above = sum(each > bar for each in self.losses)
        if recent is not None and above >= 0.9 * self.window and recent > bar * (1 + self.margin):
            steps = f"the last {self.window} steps up to {trainer.global_step}"
            cure = f"the steps undo what the model knew; set a lower {self.stage}.optimizer.lr"
            self._say(trainer, f"that of training is {recent:.3g} in {steps}: {cure}")

    def _recent(self) -> float | None:
        """Mean training loss of the last steps."""
        return sum(self.losses) / len(self.losses) if len(self.losses) == self.window else None

    def _say(self, trainer: Trainer, what: str) -> None:
        if self.finding is not None:
            return
        now = f" (it is {trainer.optimizers[0].param_groups[0]['initial_lr']:.3g})" if trainer.optimizers else ""
        self.finding = f"val loss was {self.first:.3g} before training and {what}{now}"
        if trainer.is_global_zero:
            say_above_bar(trainer, f"{self.stage}: {self.finding}")
        if self.stop:
            raise TrainingDiverged(f"{self.stage}: stopped by callbacks.first_steps.stop: {self.finding}.")


class TextSamples(Callback):
    """Shows text samples of the model: on the terminal, in ``samples.jsonl`` and as a table in W&B.

    Before the first step, every N steps, and after the last one.

    The module's ``write_samples()`` gives (prompt, text) pairs."""

    def __init__(self, path: str | Path, every_n_steps: Annotated[int, Field(ge=1)] = 200) -> None:
        self.path = Path(path)
        self.every_n_steps = every_n_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _steps_done(trainer) == 0:
            self.show(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if _steps_done(trainer) % self.every_n_steps == 0:
            self.show(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _steps_done(trainer) % self.every_n_steps:
            self.show(trainer, pl_module)

    def show(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero and not isinstance(trainer.strategy, FSDP2):
            return
        step, samples = _steps_done(trainer), pl_module.write_samples()  # from weights that all processes have
        if not trainer.is_global_zero:
            return
        rows = [{"step": step, "prompt": prompt, "text": text} for prompt, text in samples]
        append_rows(self.path, step, rows)
        for row in rows[:2]:
            line = " ".join(f"{row['prompt']} → {row['text']}".split())
            say_above_bar(trainer, f"  step {step}: {printable(line[:150])}")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("samples", columns=list(rows[0]), data=[list(row.values()) for row in rows], step=step)


def say_above_bar(trainer: Trainer, line: str) -> None:
    """Print a line while a progress bar is shown, or where there is none."""
    bar = trainer.progress_bar_callback
    bar.print(line) if bar is not None else print(line, flush=True)


def _steps_done(trainer: Trainer) -> int:
    """Batches that training has taken so far; of PPO iterations."""
    return trainer.fit_loop.epoch_loop.total_batch_idx + 1


class StageProgressBar(TQDMProgressBar):
    """Lightning's bar with the stage's name in front. Plain text: it works in terminals and notebooks alike.

    It shows the first step, every ``refresh_rate``-th, the last, and where steps are slow each of them. In a file, as
    of a scheduler or of CI, it is a line for every tenth of the way."""

    def __init__(self, stage: str, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.stage = stage
        self._shown = 0.0  # when a bar was last brought up to date

    def _bar(self, description: str, leave: bool = True, position: int = 0) -> Tqdm:
        kind, hidden = (_Lines, not leave) if _in_a_file() else (_Named, False)
        return kind(
            desc=description, leave=leave, position=2 * self.process_position + position,
            disable=self.is_disabled or hidden,
            dynamic_ncols=True, file=sys.stdout, smoothing=0, bar_format=self.BAR_FORMAT,
        )  # fmt: skip

    @property
    def validation_description(self) -> str:
        return f"{self.stage}: validation"

    @property
    def test_description(self) -> str:
        return self.stage

    predict_description = test_description

    def init_train_tqdm(self) -> Tqdm:
        return self._bar(self.stage)

    def init_validation_tqdm(self) -> Tqdm:
        inside = self.trainer.state.fn != "validate"  # of training
        return self._bar(self.validation_description, leave=not inside, position=int(inside))

    init_test_tqdm = init_predict_tqdm = init_train_tqdm

    @property
    def total_train_batches(self) -> int | float:
        """Batches of this epoch: fewer where ``max_steps`` ends it."""
        trainer, batches = self.trainer, self.trainer.num_training_batches
        if trainer.max_steps <= 0 or not trainer.lightning_module.automatic_optimization:
            return batches
        return min(batches, trainer.max_steps * trainer.accumulate_grad_batches - trainer.current_epoch * batches)

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        total = self.total_train_batches
        self.train_progress_bar.reset(None if math.isinf(total) else total)
        epoch = f", epoch {trainer.current_epoch + 1}" if trainer.current_epoch else ""
        self.train_progress_bar.set_description(f"{self.stage}{epoch}")

    def _should_update(self, current: int, total: int) -> bool:
        now = time.perf_counter()
        due = super()._should_update(current, total) or current == 1 or now - self._shown > SLOW_STEP
        if due:
            self._shown = now
        return due and self.is_enabled

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        return {name.split("/", 1)[-1]: value for name, value in metrics.items() if name != "v_num"}


class _Named(Tqdm):
    """A bar that keeps to its name: which of its loaders Lightning reads interests nobody."""

    def set_description(self, desc: str | None = None, refresh: bool = True) -> None:
        super().set_description(None if desc is None else desc.partition(" DataLoader ")[0], refresh)


class _Lines(_Named):
    """A bar in a file: a line for each tenth of the way, or where nobody knows how long it is, for each minute."""

    _said: int | float = 0

    def display(self, *_: Any, **__: Any) -> None:
        reached = 10 * self.n // self.total if self.total else self.format_dict["elapsed"] // 60
        if reached > self._said:
            print(str(self).rstrip(), file=self.fp, flush=True)
        self._said = reached

    def close(self) -> None:
        if not self.disable:
            self.disable = True
            self._decr_instances(self)


def _in_a_file() -> bool:
    return not sys.stdout.isatty() and not hasattr(sys.stdout, "pub_thread")  # a notebook's has that


def inner_bar(trainer: Trainer | None, steps: Sequence[Item], description: str) -> Iterable[Item]:
    """``steps`` with a bar of their own, which goes when they are done, where the stage has one."""
    shown = trainer is not None and trainer.progress_bar_callback is not None and trainer.is_global_zero
    quiet = not shown or _in_a_file()
    return tqdm(steps, desc=description, leave=False, file=sys.stdout, disable=quiet or len(steps) < 2)


@contextmanager
def said_when_slow(what: str, after: float = 3.0) -> Iterator[None]:
    """Context that prints ``what`` is being done inside, if that takes more than ``after`` seconds."""
    timer = threading.Timer(after, lambda: tqdm.write(f"  {what} ..."))  # which leaves bars as they are
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
