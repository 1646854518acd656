"""Functions of the user's own, given by name."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar, runtime_checkable

from lit_rlhf.errors import UserError
from lit_rlhf.text.records import Messages, shown
from lit_rlhf.text.template import Note
from lit_rlhf.text.template_form import Tools

Result = TypeVar("Result")
Ranks = list[list[int]]  # of the answers to each prompt, 1 = best


class Annotator(Protocol):
    """Protocol of an annotator, which ranks answers: a simulated labeler, a reward model, a function, a language model.

    One that has ``takes_tools = True`` gets a further argument, ``tools``: what the assistant may call, of each prompt;
    it is given where a prompt's record has some."""

    def __call__(self, prompts: Sequence[Messages], responses: Sequence[Sequence[str]]) -> Ranks:
        """The answers to each prompt in, as many as there are; a rank for each out, 1 = best, ties allowed."""
        ...


@runtime_checkable
class Reporting(Protocol):
    """Protocol of an annotator whose judging has figures of its own, which stand among those of the stage."""

    def figures(self) -> dict[str, Any]: ...


@runtime_checkable
class Questioning(Protocol):
    """Protocol of an annotator that puts a question at a time to somebody, each of which takes time or costs money."""

    def questions(self, answers: int) -> int:
        """The most that it asks about so many answers to a prompt."""
        ...


def name_of(function: Any) -> str:
    """The name of a callable in figures and messages."""
    return str(getattr(function, "name", None) or getattr(function, "__name__", type(function).__name__))


def first_failing(ask: Callable[..., Any], columns: Sequence[Sequence[Any]]) -> int | None:
    """The first row of ``columns`` on which ``ask(*columns)`` fails alone, too; None where it fails on none of them."""
    for i in range(len(columns[0])):
        try:
            ask(*(column[i : i + 1] for column in columns))
        except Exception:  # whatever a user's function may raise
            return i
    return None


def with_tools(annotator: Any, tools: Sequence[Tools], note: Note) -> dict[str, Sequence[Tools]]:
    """The keyword ``tools`` for an annotator that looks at what the assistant may call (its ``takes_tools``); where
    there are tools and it does not, ``note`` gets a line."""
    if not any(tools):
        return {}
    if getattr(annotator, "takes_tools", False):
        return {"tools": tools}
    note(f"the annotator {name_of(annotator)} is not shown the tools that the prompts' records describe")
    return {}


def resolve(function: Any, address: str) -> Callable[..., Any]:
    """The callable, or the one of that name; ``address`` is the setting that names it.

    Raises ``UserError`` where there is none."""
    if callable(function):
        return function
    module, _, name = str(function).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{address}: {function!r} is no function ({error}); give module.function of a module that Python finds "
            "from the current folder"
        ) from None
    if not callable(found):
        raise UserError(f"{address}: {function!r} is a {type(found).__name__}, not a function")
    return found


def place(prompt: Messages) -> str:
    """A prompt as errors name it."""
    return f"the prompt {shown(prompt)[:80]!r}"


def run_async(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """The coroutine's result, in a notebook too, where a loop is running already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, coroutine).result()
