"""Checkpoints of a training that may be stopped at any moment, any number of times, and goes on exactly."""

from __future__ import annotations

import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from pydantic import Field
from torch.optim import Optimizer

from lit_rlhf.errors import Interrupted, NotFinite, TrainingDiverged, UserError, say
from lit_rlhf.files import disk, make_folder
from lit_rlhf.processes import is_main_process
from lit_rlhf.training.callbacks import said_when_slow
from lit_rlhf.training.checkpoint_files import keep_checkpoint
from lit_rlhf.training.diverging import non_finite_weights
from lit_rlhf.training.fsdp import FSDP2
from lit_rlhf.training.metrics_file import MetricsFile, logged_rows


class RandomState(Callback):
    """Keeps the random number generators of every process in the checkpoint; Lightning does not."""

    def __init__(self) -> None:
        self._restored: dict[str, Any] | None = None
        self._processes = 1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._processes = trainer.world_size

    def state_dict(self) -> dict[str, Any]:
        mine = _random_state()
        if self._processes == 1:
            return {"ranks": [mine]}
        ranks: list[Any] = [None] * self._processes
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


# What asks a training to stop: Ctrl-C; a scheduler that takes its machine back; a terminal that was closed.
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]


def handle_signals(handler: Callable[[int, Any], None] | signal.Handlers) -> dict[int, Any]:
    """Have what asks to stop handled; returns the handlers before. A closed terminal that ``nohup`` ignores stays so.

    Ctrl-C is heeded where a shell ignores it, too: it does in all that a script starts in the background."""
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python lets nobody
        return {}
    closed = getattr(signal, "SIGHUP", None)
    heeded = [number for number in STOPPING if number != closed or signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heeded}


class LastCheckpoint(Callback):
    """Saves ``<folder>/last.ckpt`` between steps: every N batches, at the end, and when a signal asks to stop.

    Always after a whole step and the validation behind it, so that what is resumed is what an uninterrupted run had
    there. The file is written under another name, and gets its own when what the step has logged is on disk, too:
    whenever the process is killed, there is a checkpoint with all the rows of ``metrics.csv`` up to it. One that is
    written while training goes on (``FSDP2.save_async``) gets its name between two later steps. To be placed behind the
    callbacks whose state it saves.

    ``rescue`` makes another stage folder, into which the last whole step and what was logged are saved where ``folder``
    was deleted or renamed; ``rescued`` is that folder."""

    def __init__(
        self,
        folder: str | Path,
        every_n_batches: Annotated[int, Field(ge=1)] = 100,
        rescue: Callable[[], Path] | None = None,
    ) -> None:
        self.path = Path(folder) / "last.ckpt"
        self.rescue = rescue
        self.rescued: Path | None = None
        self._folder: int | None = None  # its inode, while training
        self.every_n_batches = every_n_batches
        self._signal: int | None = None  # that asked to stop
        self._due = False  # the step that has ended is to be saved
        self._unkept = False  # a checkpoint is written, and what its step logs is not yet
        self._stopped = 0  # the batch after which the wish to stop was saved
        self._handlers: dict[int, Any] = {}
        self._resumed = False
        self._ended_early = False  # before the trainer's limits, as `should_stop` asks
        self.earlier_seconds = self.earlier_cpu_seconds = 0.0  # of starts that were interrupted
        self._begun, self._cpu_begun = time.perf_counter(), time.process_time()

    def state_dict(self) -> dict[str, Any]:
        seconds = self.earlier_seconds + time.perf_counter() - self._begun
        cpu_seconds = self.earlier_cpu_seconds + time.process_time() - self._cpu_begun
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "ended_early": self._ended_early}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.earlier_seconds, self._ended_early = state_dict["seconds"], state_dict.get("ended_early", False)
        self.earlier_cpu_seconds = state_dict.get("cpu_seconds", 0.0)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the loops' progress as Lightning can resume it: its own, of an epoch's last step, it counts wrongly."""
        checkpoint["rows"] = self._written(trainer)
        epoch = trainer.num_training_batches
        if math.isinf(epoch):  # of a loader without a length
            return
        fit = checkpoint["loops"]["fit_loop"]
        batches = fit["epoch_loop.batch_progress"]
        ended, rest = divmod(batches["total"]["ready"], epoch)
        begun = ended + (rest > 0)
        for part in ("total", "current"):
            fit["epoch_progress"][part] = {"ready": ended + 1, "started": begun, "processed": ended, "completed": ended}
            batches[part]["completed"] -= trainer.validating  # as before the validation, which is not done again
        batches["is_last_batch"] = False

    def _written(self, trainer: Trainer) -> dict[str, int]:
        """File -> rows that the steps so far have written into it, or are about to."""
        rows = {name: logged_rows(file) for name, file in self._files(trainer).items() if file.exists()}
        logs = (log for log in trainer.loggers if isinstance(log, MetricsFile) and log.rows)
        return {**rows, **{log.path.name: log.rows for log in logs}}

    def _files(self, trainer: Trainer) -> dict[str, Path]:
        """Name -> file, of those to which steps add rows."""
        logs = [log.path for log in trainer.loggers if isinstance(log, MetricsFile)]
        beside = [self.path.parent.parent / name for name in ("samples.jsonl", "health.jsonl")]
        return {file.name: file for file in [*beside, *logs]}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say which rows, of steps before the checkpoint, are not there any more."""
        self._resumed = True
        for name, file in self._files(trainer).items():
            rows = checkpoint.get("rows", {}).get(name)
            if rows is None or not trainer.is_global_zero:
                continue
            if not file.exists():
                say(f"{file}: it is not there any more, which had {rows} rows before the checkpoint; training goes on")
            elif (found := logged_rows(file)) < rows:
                say(f"{file}: {rows - found} of {rows} rows before the checkpoint are not there; training goes on")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signal, self._due, self._stopped, self._unkept = None, False, 0, False
        trainer.should_stop |= self._ended_early
        if self._resumed:
            check_training(pl_module, trainer.optimizers, self.path)
        self._folder = make_folder(self.path.parent).stat().st_ino
        self._handlers = handle_signals(self._on_signal)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        batches = loop.total_batch_idx + 1
        stop = trainer.strategy.reduce_boolean_decision(self._signal is not None or self._gone(), all=False)
        # Between the micro-batches of one optimizer step nothing is saved: the gathered gradients would be lost.
        if not loop._should_accumulate() and (stop or batches % self.every_n_batches == 0):
            self._keep(trainer)  # what is still being written
            self._stopped = batches if stop else 0
            self._due = True
            if not loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
                self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._due:
            self._save(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # Not sooner: Lightning logs a step, and a validation after it, when the step has ended.
        self._keep(trainer, wait=self._stopped > 0)
        self._raise_if_stopped()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended_early = trainer.should_stop
        self._save(trainer)
        self._keep(trainer)
        if trainer.strategy.reduce_boolean_decision(self._signal is not None, all=False):  # in a validation at the end
            self._stopped = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        self._raise_if_stopped()
        self._restore_handlers()
        self._folder = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore_handlers()
        if isinstance(exception, TrainingDiverged):
            kept = self.path.exists()
            there = f"The last good checkpoint is kept: {self.path}" if kept else "There is no checkpoint yet"
            exception.args = (f"{exception} {there}",)
        alone = self.rescue is None or not trainer.is_global_zero or isinstance(trainer.strategy, FSDP2)
        if alone or not self._gone():  # of sharded models all processes would have to save together
            return
        loop = trainer.fit_loop.epoch_loop
        if loop.batch_progress.total.ready == loop.batch_progress.total.processed and not loop._should_accumulate():
            self._move(trainer)
            with disk(self.path):
                trainer.save_checkpoint(self.path)

    def _gone(self) -> bool:
        """Whether the folder in which training began has been deleted or renamed."""
        try:
            return self._folder is not None and self.path.parent.stat().st_ino != self._folder
        except FileNotFoundError:
            return True

    def _move(self, trainer: Trainer) -> None:
        """Save into another folder, for this one has gone."""
        if self.rescue is None:
            raise FileNotFoundError(str(self.path.parent))
        self.rescued = self.rescue()
        self.path = self.rescued / "checkpoints" / "last.ckpt"
        self._folder = make_folder(self.path.parent).stat().st_ino
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.move(self.rescued / "metrics.csv")

    def _save(self, trainer: Trainer) -> None:
        for said in non_finite_weights(trainer.lightning_module, trainer.optimizers):
            raise NotFinite(said)  # the checkpoint before stays
        if self._gone():
            self._move(trainer)
        with disk(self.path), said_when_slow(f"writing {self.path}"):
            trainer.save_checkpoint(self.path.with_suffix(".tmp"))
        self._due, self._unkept = False, True

    def _keep(self, trainer: Trainer, wait: bool = True) -> None:
        """Let the checkpoint that was saved take the place of the one before; without ``wait``, if it is written."""
        if not self._unkept:
            return
        with disk(self.path), said_when_slow(f"writing {self.path}"):
            if isinstance(trainer.strategy, FSDP2) and not trainer.strategy.saved(wait):
                return
            self._unkept = False
            for logger in trainer.loggers:
                if isinstance(logger, MetricsFile):
                    logger.write()
            if trainer.is_global_zero:
                keep_checkpoint(self.path.with_suffix(".tmp"), self.path)

    def _raise_if_stopped(self) -> None:
        if self.rescued is not None:
            raise FileNotFoundError(str(self.rescued))
        if self._stopped:
            self._restore_handlers()
            raise Interrupted(
                f"stopped after step {self._stopped}, which is saved; run the same command again to go on", self._signal
            )

    def _on_signal(self, number: int, _: Any) -> None:
        if number == self._signal == signal.SIGINT:  # pressed twice: now, without saving
            raise KeyboardInterrupt
        if self._signal is None and is_main_process():  # not by print, which it may have interrupted
            with suppress(OSError):
                os.write(1, b"\nstopping: this step is ended and saved first\n")
        self._signal = number

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


DIVERGED = (
    "the training has diverged, and neither goes on from there nor is exported. Delete the checkpoints, lower the "
    "learning rate, and run it again"
)


def check_training(module: LightningModule, optimizers: Sequence[Optimizer], path: Path) -> None:
    """Raise ``UserError`` where a weight, or what an optimizer keeps, came as NaN or infinity from ``path``."""
    for said in non_finite_weights(module, optimizers):
        raise UserError(f"{path}: {said}; {DIVERGED}")


class BestCheckpoint(Callback):
    """Saves ``<folder>/best.ckpt`` whenever a validation during training shows a better figure than all before.

    ``best`` is what that was: metric, value, step; None before any."""

    def __init__(self, folder: str | Path, metric: str, mode: Literal["max", "min"] = "max") -> None:
        self.path = Path(folder) / "best.ckpt"
        self.metric, self.mode = metric, mode
        self.best: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        if self.metric not in trainer.callback_metrics:
            known = ", ".join(sorted(n for n in trainer.callback_metrics if n.startswith("val/")))
            raise UserError(f"keep.metric={self.metric}: validation logs no such figure; there are {known}")
        value = trainer.callback_metrics[self.metric].item()
        if math.isnan(value):  # there was nothing to measure
            return
        if self.best is None or (value > self.best["value"] if self.mode == "max" else value < self.best["value"]):
            self.best = {"metric": self.metric, "value": value, "step": trainer.fit_loop.epoch_loop.total_batch_idx + 1}
            with disk(self.path):
                trainer.save_checkpoint(self.path)

    def restore(self, trainer: Trainer) -> None:
        """Give the module of ``trainer`` the best weights."""
        if self.best is not None:
            trainer.strategy.load_model_state_dict(trainer.strategy.load_checkpoint(self.path, weights_only=True))
