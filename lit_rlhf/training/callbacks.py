"""What every stage needs around its training: exact resuming, a guard against NaN, text samples, a progress bar."""

from __future__ import annotations

import json
import math
import random
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import WandbLogger
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from lit_rlhf.errors import Interrupted, TrainingDiverged, UserError
from lit_rlhf.training.checkpoint_files import read_checkpoint
from lit_rlhf.training.metrics_file import MetricsFile, append_rows

Item = TypeVar("Item")
SLOW_STEP = 1.0  # seconds after which a bar is brought up to date at the next step


class RandomState(Callback):
    """Keeps the random number generators of every process in the checkpoint; Lightning does not."""

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        mine = _random_state()
        if not (dist.is_available() and dist.is_initialized()):
            return {"ranks": [mine]}
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, mine)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # As late as can be: building loaders and loading weights may draw numbers too.
        if self._restored is not None and trainer.global_rank < len(self._restored["ranks"]):
            _set_random_state(self._restored["ranks"][trainer.global_rank])

    # A validation draws nothing from what training will draw: on resuming, the one after the saved step is left out.

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training = _random_state()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _set_random_state(self._training)


def _random_state() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {  # plain lists and tensors: a checkpoint must load with weights_only
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(numbers), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


class LastCheckpoint(Callback):
    """Saves ``<folder>/last.ckpt`` between steps: every N batches, at the end, and on Ctrl-C or SIGTERM.

    Always after a whole step, so that what is resumed is what an uninterrupted run had there. The file is written under
    another name, and gets its own when what the step has logged is on disk, too: whenever the process is killed, there
    is a checkpoint with all the rows of ``metrics.csv`` up to it."""

    def __init__(self, folder: str | Path, every_n_batches: Annotated[int, Field(ge=1)] = 100) -> None:
        self.path = Path(folder) / "last.ckpt"
        self.every_n_batches = every_n_batches
        self._handlers: dict[int, Any] = {}
        self.earlier_seconds = 0.0  # of starts that were interrupted
        self._begun = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.earlier_seconds + time.perf_counter() - self._begun}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.earlier_seconds = state_dict["seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._interrupted = self._unkept = False  # unkept: a checkpoint is written, and what its step logs is not yet
        self._stopped = 0  # the batch after which the user's wish to stop was saved
        if threading.current_thread() is threading.main_thread():
            # SIGTERM too: a cluster that takes its machine back sends it, and Lightning only notes it down.
            self._handlers = {s: signal.signal(s, self._on_interrupt) for s in (signal.SIGINT, signal.SIGTERM)}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        stop = trainer.strategy.reduce_boolean_decision(self._interrupted, all=False)
        # Between the micro-batches of one optimizer step nothing is saved: the gathered gradients would be lost.
        if batches % trainer.accumulate_grad_batches == 0 and (stop or batches % self.every_n_batches == 0):
            self._save(trainer)
            self._stopped = batches if stop else 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._keep(trainer)  # not sooner: Lightning logs a step, and a validation after it, when the step has ended
        self._raise_if_stopped()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)
        self._keep(trainer)
        if trainer.strategy.reduce_boolean_decision(self._interrupted, all=False):  # also in a validation at the end
            self._stopped = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        self._raise_if_stopped()
        self._restore_handler()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore_handler()

    def _save(self, trainer: Trainer) -> None:
        with self._disk(), said_when_slow(f"writing {self.path}"):
            trainer.save_checkpoint(self.path.with_suffix(".tmp"))
        self._unkept = True

    def _keep(self, trainer: Trainer) -> None:
        """Let the checkpoint that was saved take the place of the one before."""
        if not self._unkept:
            return
        self._unkept = False
        with self._disk():
            for logger in trainer.loggers:
                if isinstance(logger, MetricsFile):
                    logger.write()
            if trainer.is_global_zero:
                self.path.with_suffix(".tmp").replace(self.path)

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); is the disk full?") from error

    def _raise_if_stopped(self) -> None:
        if self._stopped:
            self._restore_handler()
            raise Interrupted(
                f"stopped after step {self._stopped}, which is saved; run the same command again to go on"
            )

    def _on_interrupt(self, *_: Any) -> None:
        if self._interrupted:  # pressed twice: now, without saving
            raise KeyboardInterrupt
        self._interrupted = True

    def _restore_handler(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


class BestCheckpoint(Callback):
    """Saves ``<folder>/best.ckpt`` whenever a validation during training shows a better figure than all before.

    What the best was stands beside it in ``best.json``: a run that was stopped right after the validation knows it."""

    def __init__(self, folder: str | Path, metric: str, mode: Literal["max", "min"] = "max") -> None:
        self.path = Path(folder) / "best.ckpt"
        self.metric, self.mode = metric, mode

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        if self.metric not in trainer.callback_metrics:
            known = ", ".join(sorted(n for n in trainer.callback_metrics if n.startswith("val/")))
            raise UserError(f"keep.metric={self.metric}: validation logs no such figure; there are {known}")
        value = trainer.callback_metrics[self.metric].item()
        if math.isnan(value):  # there was nothing to measure
            return
        best = self.best()
        if best is None or (value > best["value"] if self.mode == "max" else value < best["value"]):
            trainer.save_checkpoint(self.path)
            if trainer.is_global_zero:
                step = trainer.fit_loop.epoch_loop.total_batch_idx + 1
                note = {"metric": self.metric, "value": value, "step": step}
                self.path.with_suffix(".json").write_text(json.dumps(note), encoding="utf-8")

    def best(self) -> dict[str, Any] | None:
        """The best figure so far: metric, value, step."""
        file = self.path.with_suffix(".json")
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def restore(self, module: LightningModule) -> None:
        """Give ``module`` the best weights."""
        if self.path.is_file():
            module.load_state_dict(read_checkpoint(self.path)["state_dict"])


class StopOnNonFinite(Callback):
    """Ends training before a loss or a gradient that is not a finite number can touch the weights."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            self._stop(trainer, f"the loss is {loss.item()}")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            names = [n for n, p in pl_module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            self._stop(trainer, f"the gradient of {len(names)} parameters is not finite, {names[0]} among them")

    def _stop(self, trainer: Trainer, what: str) -> None:
        raise TrainingDiverged(
            f"{self.stage}: at step {trainer.fit_loop.epoch_loop.total_batch_idx + 1} {what}; stopped before the "
            f"weights changed. The last good checkpoint is kept. Usual cures: a lower {self.stage}.optimizer.lr, "
            "gradient clipping, precision 32-true"
        )


class FirstSteps(Callback):
    """Says in one line where a loss rises past the one before training, and which setting to change.

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
        loss = getattr(pl_module, "latest_loss", None)
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
            line, bar = f"{self.stage}: {self.finding}", trainer.progress_bar_callback
            bar.print(line) if bar is not None else print(line, flush=True)
        if self.stop:
            raise TrainingDiverged(f"{self.stage}: stopped by callbacks.first_steps.stop: {self.finding}")


class TextSamples(Callback):
    """Shows what the model writes: on the terminal, in ``samples.jsonl`` and as a table in W&B.

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
        if not trainer.is_global_zero:
            return
        step, samples = _steps_done(trainer), pl_module.write_samples()
        rows = [{"step": step, "prompt": prompt, "text": text} for prompt, text in samples]
        append_rows(self.path, step, rows)
        bar = trainer.progress_bar_callback
        for row in rows[:2]:
            line = " ".join(f"{row['prompt']} → {row['text']}".split())
            text = f"  step {step}: {line[:150]}"
            bar.print(text) if bar is not None else print(text)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("samples", columns=list(rows[0]), data=[list(row.values()) for row in rows], step=step)


def _steps_done(trainer: Trainer) -> int:
    """Batches that training has taken so far; of PPO iterations."""
    return trainer.fit_loop.epoch_loop.total_batch_idx + 1


class StageProgressBar(TQDMProgressBar):
    """Lightning's bar with the stage's name in front. Plain text: it works in notebooks, logs and CI alike.

    It shows the first step, every ``refresh_rate``-th, the last, and where steps are slow each of them."""

    def __init__(self, stage: str, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.stage = stage
        self._shown = 0.0  # when a bar was last brought up to date

    def _bar(self, description: str, leave: bool = True, position: int = 0) -> Tqdm:
        return _Named(
            desc=description, leave=leave, position=2 * self.process_position + position, disable=self.is_disabled,
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
        """Of this epoch: fewer where ``max_steps`` ends it."""
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


def inner_bar(trainer: Trainer | None, steps: Sequence[Item], description: str) -> Iterable[Item]:
    """``steps`` with a bar of their own, which goes when they are done, where the stage has one."""
    quiet = trainer is None or trainer.progress_bar_callback is None or not trainer.is_global_zero
    return tqdm(steps, desc=description, leave=False, file=sys.stdout, disable=quiet or len(steps) < 2)


@contextmanager
def said_when_slow(what: str, after: float = 3.0) -> Iterator[None]:
    """Say on the terminal ``what`` is being done inside, if that takes more than ``after`` seconds."""
    timer = threading.Timer(after, lambda: tqdm.write(f"  {what} ..."))  # which leaves bars as they are
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
