"""Where one stage of a run is written: by whom, whether it is finished, and how it takes another's place."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from lit_rlhf.errors import UserError, say
from lit_rlhf.files import NEW, damaged, disk, make_folder, write_yaml
from lit_rlhf.finished import changes, check_unchanged, read_done, write_done
from lit_rlhf.models.checkpoint import OLD, put_in_place
from lit_rlhf.pipeline.process_group import processes_of
from lit_rlhf.pipeline.run_folder import absolute, collecting_stage, fingerprint_of, input_paths, read_settings
from lit_rlhf.pipeline.settings import resolved

# How a stage is watched, how a judge is reached, where tokens are kept and which processes share the work, does not
# change what comes out of it.
WATCHING = ("checkpoint_every", "samples_every", "trainer.log_every_n_steps", "health")
KEEPING = ("data.cache", "ptx.cache", "module.ptx.cache")
SPREADING = tuple(f"trainer.{name}" for name in ("devices", "num_nodes", "strategy"))  # over processes
REACHING = tuple(f"annotator.{name}" for name in ("url", "api_key_env", "concurrency", "timeout", "retries", "backoff"))
PER_PROCESS = ("data.batch_size", "module.minibatch_size")  # of a stage that trains: what counts is the size of a step


@contextmanager
def held(file: Path, place: Path, another: str) -> Iterator[None]:
    """Hold the lock ``file`` of what is written into ``place``. Raises ``UserError`` where another process does, with
    the setting by which ``another`` place is chosen; a crash frees it."""
    holder = f"process {os.getpid()} on {platform.node()} since {datetime.now():%Y-%m-%d %H:%M:%S}"
    lock = FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        file.write_text(holder, encoding="utf-8")
    except Timeout:
        other = file.read_text(encoding="utf-8", errors="replace") or "another process"
        raise UserError(
            f"{place} is being written by {other}; wait for that to end, stop it, or choose another {another}"
        ) from None
    except (OSError, NotImplementedError) as error:  # some network file systems
        say(f"{file} cannot be locked ({error}); see to it that no other command writes {place}")
    try:
        yield
    finally:
        with suppress(OSError):  # of a disk that has come to be read-only
            file.unlink(missing_ok=True)
        lock.release()


class StageFolder:
    """``runs/<run>/<stage>/``; done again (``overwrite=true``), ``<stage>.new`` beside it until that is whole."""

    def __init__(self, cfg: DictConfig, stage: str) -> None:
        self.stage = stage
        self.overwrite = bool(cfg.overwrite)
        self.run = Path(cfg.paths.run_dir)
        self.place = self.run / stage
        self.path = self.run / f"{stage}{NEW}" if self.overwrite else self.place
        self.settings: dict[str, Any] = {
            stage: resolved(cfg, stage),
            "world": {"seed": cfg.world.seed},
            "split": {"seed": cfg.split.seed},
            "origin": {
                "from_run": None if Path(cfg.paths.runs) / cfg.from_run == self.run else cfg.from_run,
                "checkpoint": absolute(cfg.model.path) if OmegaConf.select(cfg, "model.path") else None,
                "recipe": cfg.recipe,
            },
        }

    @property
    def done(self) -> dict[str, Any] | None:
        """The record of the finished stage; None while it is not finished."""
        return read_done(self.path) or None

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint from which an interrupted training goes on; None without one."""
        path = self.path / "checkpoints" / "last.ckpt"
        return path if os.path.lexists(path) else None

    def check(self) -> bool:
        """Whether the stage is finished already; raises ``UserError`` where it was made by other settings, or would
        replace what it starts from."""
        if self.overwrite:
            self._check_own_inputs()
        if self.overwrite or not self._has_results():
            return False
        changed = self._changed()
        if changed and self._waits_for_people() and all(c.startswith(f"{self.stage}.annotator") for c in changed):
            return False
        if changed:
            more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
            raise UserError(
                f"{self.path} was made by other settings: {'; '.join(changed[:3])}{more}. Choose another run= (with "
                f"from_run={self.run.name} to start from its models), or overwrite=true to do it again."
            )
        done = self.done
        if done is None:
            return False
        self._check_files()
        for path, known in done["inputs"].items():
            now_there = fingerprint_of(self.run / path)
            if now_there is None or now_there.startswith(known):  # older versions wrote down a file's size alone
                continue
            if self._waits_for_people():
                return False  # people have judged more
            raise UserError(
                f"{self.path} was made from another {Path(path).parent.name} than what is in "
                f"{os.path.normpath(self.run / path)} now; do it again with overwrite=true, or choose another run="
            )
        return True

    def _check_own_inputs(self) -> None:
        for address, path in input_paths(self.stage, self.settings[self.stage]):
            if Path(path).resolve().is_relative_to(self.place.resolve()):
                raise UserError(
                    f"{address}={path}: overwrite=true replaces {self.place}, which this stage would start from; "
                    f"choose another run= (with from_run={self.run.name})"
                )

    def settle(self) -> None:
        """Go to the end of what a start was killed in: putting a stage that was done again in the old one's place."""
        new, old = (self.place.with_name(f"{self.stage}{end}") for end in (NEW, OLD))
        ended, before = (folder / "done.json" for folder in (new, self.place))
        with disk(self.place):
            if ended.is_file() and before.is_file() and ended.stat().st_mtime_ns < before.stat().st_mtime_ns:
                shutil.rmtree(new)  # it was exchanged
            elif ended.is_file() and not self.overwrite:
                put_in_place(new, self.place)
                say(f"{self.stage}: {self.place} is the one that a start which was killed had done again")
            elif old.exists() and not self.place.exists():
                old.rename(self.place)
            shutil.rmtree(old, ignore_errors=True)

    def _check_files(self) -> None:
        """Raise ``UserError`` where what others read is not as the finished stage left it, and say what else is not.

        A model that was removed as a whole is missed by those who want it."""
        for name in ("model", "adapter", "trained_prompts.txt"):
            if (self.path / name).exists() or name == "trained_prompts.txt":
                check_unchanged(self.path / name)
        for name, how in changes(self.path).items():
            if not name.startswith(("model", "adapter")):
                say(f"{self.stage}: {os.path.normpath(self.path / name)}: {how} since the stage ended")

    def _changed(self) -> list[str]:
        """Settings that are others than those that were written down."""
        before = self._comparable(read_settings(self.path))
        now = self._comparable(self.settings)
        of_all = {f"{self.stage}.{name}": f"{self.stage}.{name} times processes" for name in PER_PROCESS}
        return [
            f"{of_all.get(key, key)} was {before.get(key, 'not there')}, now {now.get(key, 'not there')}"
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key)
        ]

    def _has_results(self) -> bool:
        """Whether anything was reached: a start that failed before its first checkpoint binds nobody."""
        reached = self.done is not None or self.checkpoint is not None or (self.path / "progress.jsonl").exists()
        if reached and not (self.path / "config.yaml").exists():
            raise damaged(self.path / "config.yaml", "it is gone, and results are there")
        return reached

    def _waits_for_people(self) -> bool:
        """Whether there are answers that nobody but people has ranked: who they are, and what they say, may change."""
        return (self.path / "progress.jsonl").is_file() and not (self.path / "progress.ranks.jsonl").is_file()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock of the stage; see :func:`held`."""
        with held(self.run / f".{self.stage}.lock", self.place, "run="):
            yield

    def begin(self) -> None:
        """Make the folder and write down the settings; what an interrupted start with others had reached is removed."""
        with disk(self.path):
            if self.overwrite and (not (self.path / "config.yaml").is_file() or self._changed()):
                shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "done.json").unlink(missing_ok=True)
            self._write_settings(self.path)

    @property
    def gone(self) -> bool:
        """Whether the folder was deleted or renamed since :meth:`begin`; what was written since made it anew."""
        return not (self.path / "config.yaml").is_file()

    def written_here(self) -> dict[str, Any]:
        """The stage's settings, with the files that it writes into its folder where that is now."""
        read = {path for _, path in input_paths(self.stage, self.settings[self.stage])}

        def moved(node: Any) -> Any:
            if isinstance(node, dict):
                return {key: moved(value) for key, value in node.items()}
            if isinstance(node, str) and node not in read and Path(node).is_relative_to(self.place):
                return str(self.path / Path(node).relative_to(self.place))
            return node

        return moved(self.settings[self.stage])

    def rescue(self) -> Path:
        """A folder like this one, of a run beside this one: for what is in memory when this one has gone."""
        path = make_folder(self.run.with_name(f"{self.run.name}-rescue") / self.stage)
        self._write_settings(path)
        return path

    def move(self) -> None:
        """Let what comes out be written into :meth:`rescue`."""
        self.path = self.place = self.rescue()
        self.run = self.path.parent

    def _write_settings(self, folder: Path) -> None:
        write_yaml(folder / "config.yaml", self.settings)

    def finish(self, record: dict[str, Any]) -> None:
        """Mark the stage as finished, and put it in its place."""
        inputs = {os.path.relpath(path, self.run): fingerprint_of(path) for path in self.inputs()}
        collected = [*(self.run / "data").glob("*-*.jsonl")] if self.stage == collecting_stage() else []
        written = [file for file in collected if file.name.startswith(("answers-", "rankings-"))]
        write_done(self.path, {"stage": self.stage, **record, "inputs": inputs}, written)
        if self.path != self.place:
            put_in_place(self.path, self.place)
            self.path = self.place

    def inputs(self) -> list[Path]:
        """The models and data of other stages that this one reads."""
        found = [Path(path) for _, path in input_paths(self.stage, self.settings[self.stage])]
        return [path for path in found if path.exists()]

    def _comparable(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Address -> value, without what does not matter; paths as seen from the run, which may have been moved."""
        flat, own = {key: value for key, value in _flat(settings) if key != "format"}, settings.get(self.stage) or {}
        if own.get("run") == "fit":
            processes = processes_of(OmegaConf.create(own["trainer"]))
            sizes = [key for key in (f"{self.stage}.{name}" for name in PER_PROCESS) if isinstance(flat.get(key), int)]
            flat |= {key: flat[key] * processes for key in sizes}
        skip = ("origin.", *(f"{self.stage}.{name}." for name in (*WATCHING, *KEEPING, *SPREADING, *REACHING)))
        return {key: self._relative(value) for key, value in flat.items() if not f"{key}.".startswith(skip)}

    def _relative(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._relative(v) for v in value]
        if isinstance(value, str) and value and os.path.exists(value):
            return os.path.relpath(value, self.run)
        return value


def _flat(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(node, dict):
        return [pair for key, value in node.items() for pair in _flat(value, f"{prefix}{key}.")]
    return [(prefix[:-1], node)]
