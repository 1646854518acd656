"""Tasks of EleutherAI's lm-evaluation-harness, run on the models of an evaluation."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import UserError, first_line, say_once

NOT_FOR_USERS = ("`pretrained` model kwarg is not of type", "Passed an already-initialized model")


class Benchmark(Protocol):
    """Protocol of tasks that a model is asked by itself."""

    def __call__(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, float]]:
        """Task -> metric -> value."""
        ...


class LMEval:
    """Runs tasks of lm-evaluation-harness on one model after the other.

    The folders that stages export are Hugging Face's, so ``lm_eval --model hf --model_args pretrained=FOLDER`` gives
    the same figures. Raises ``UserError`` where the package is not installed, a task is not known, or its data cannot
    be read. What the harness warns of, texts that it cuts say, is said once.

    Args:
        tasks: names of tasks or groups.
        include_path: a folder with task files of your own (``.yaml``); None: only those of the harness.
        include_defaults: whether the harness' own tasks are known; None: where there is no ``include_path``.
        num_fewshot: solved examples before each question; None: as the task says.
        limit: at most so many questions per task; None: all.
        batch_size: requests per forward pass.
        chat: ask through the model's chat template.
    """

    def __init__(
        self,
        tasks: str | Sequence[str],
        *,
        include_path: str | Path | None = None,
        include_defaults: bool | None = None,
        num_fewshot: Annotated[int, Field(ge=0)] | None = None,
        limit: Annotated[int, Field(ge=1)] | None = None,
        batch_size: Annotated[int, Field(ge=1)] = 16,
        chat: bool = False,
    ) -> None:
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError("evaluate/benchmark=lm_eval needs the package lm_eval: pip install 'lit-rlhf[eval]'")
        if include_path is not None and not Path(include_path).is_dir():
            raise UserError(f"include_path={include_path} (evaluate.benchmark): there is no such folder of task files")
        self.tasks = [tasks] if isinstance(tasks, str) else list(tasks)
        self.include_path = include_path
        self.include_defaults = include_path is None if include_defaults is None else include_defaults
        self.num_fewshot, self.limit, self.batch_size, self.chat = num_fewshot, limit, batch_size, chat
        self.known = self._index()  # a task that is not there is said before anything is sampled

    def _index(self) -> Any:
        """The harness' index of tasks; raises ``UserError`` where one of ours is not among them."""
        from lm_eval.tasks import TaskManager

        path = None if self.include_path is None else str(self.include_path)
        known = TaskManager(include_path=path, include_defaults=self.include_defaults)
        if unknown := [task for task in self.tasks if not known.match_tasks([task])]:
            hint = "include_path finds one of your own" if path is None else f"not in {path}"
            more = "" if self.include_defaults else "; include_defaults=true adds the harness' own"
            raise UserError(f"tasks (evaluate.benchmark): there is no task {unknown[0]!r}; {hint}{more}")
        return known

    def __call__(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, float]]:
        """Task -> its metrics, their standard errors (``<metric>_stderr``) and ``n``, the questions."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        try:
            with _said_once(), _unheard():  # it has a progress bar for every kind of request
                found = simple_evaluate(
                    HFLM(pretrained=policy, tokenizer=tokenizer, batch_size=self.batch_size),
                    tasks=self.tasks, task_manager=self.known, num_fewshot=self.num_fewshot, limit=self.limit,
                    apply_chat_template=self.chat, log_samples=False,
                )  # fmt: skip
        except Exception as error:  # of a task file, its data or its template, of any kind
            raise UserError(
                f"tasks (evaluate.benchmark): {', '.join(self.tasks)}: {type(error).__name__}: {first_line(error)}"
            ) from error
        return {task: _plain(row) | _count(found, task) for task, row in found["results"].items()}


@contextmanager
def _unheard() -> Iterator[None]:
    """Nothing on standard error, nor from processes begun meanwhile: the harness asks git for a commit of the current
    folder's, which calls it fatal where that is none of git's."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _plain(row: dict[str, Any]) -> dict[str, float]:
    """Metrics without the name of the filter that every task has ("acc,none"), and only what is a number."""
    metrics: dict[str, float] = {}
    for key, value in row.items():
        name, _, how = key.partition(",")
        with suppress(TypeError, ValueError):
            if how:
                metrics[name if how == "none" else f"{name}_{how}"] = float(value)
    return metrics


def _count(found: dict[str, Any], task: str) -> dict[str, float]:
    """``n``: questions that were asked; a group of tasks has none of its own."""
    return {"n": found["n-samples"][task]["effective"]} if task in found.get("n-samples", {}) else {}


@contextmanager
def _said_once() -> Iterator[None]:
    """The harness' warnings as lines of ours, the first of each kind."""
    logger, kinds = logging.getLogger("lm_eval"), set[object]()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            kind, line = (record.name, record.lineno), record.getMessage()
            if kind not in kinds and not line.startswith(NOT_FOR_USERS):
                say_once(f"evaluate.benchmark: {' '.join(line.split())}")
            kinds.add(kind)

    handler, propagate = Handler(logging.WARNING), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
