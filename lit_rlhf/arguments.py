"""Arguments of constructors held against their types: ``Annotated[float, Field(ge=0)]``, ``Literal["fail", "skip"]``.

A notebook hears of a value out of its range when it makes an object, as the command does before it loads anything."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from functools import cache, wraps
from typing import Any, Protocol, TypeVar

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import SchemaError

from lit_rlhf.errors import UserError

Class = TypeVar("Class", bound=type)


def checked(kind: Class) -> Class:
    """Class decorator: ``__init__`` raises ``UserError`` for arguments out of the ranges that its annotations state."""
    own = kind.__init__  # type: ignore[misc]
    names = list(inspect.signature(own).parameters)[1:]

    @wraps(own)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        check_arguments(kind, {**dict(zip(names, args)), **kwargs})
        own(self, *args, **kwargs)

    kind.__init__ = init  # type: ignore[misc]
    return kind


def check_arguments(kind: type, values: Mapping[str, Any]) -> None:
    """Raise ``UserError`` where a number or text is none that the constructor of ``kind`` takes.

    Objects are left to what they are used for, but for a model in the place of a tokenizer."""
    for name, value in values.items():
        if name not in _types(kind):
            continue
        hint, adapter = _types(kind)[name]
        if "PreTrainedTokenizerBase" in str(hint) and hasattr(value, "parameters"):
            order = ", ".join(n for n, p in inspect.signature(kind).parameters.items() if p.kind is not p.KEYWORD_ONLY)
            raise UserError(
                f"{kind.__name__}({name}={type(value).__name__}(...)): a model, where a tokenizer was expected; the "
                f"arguments are {kind.__name__}({order})"
            )
        if not isinstance(value, int | float | str):
            continue
        given = f"{kind.__name__}({name}={value!r})"
        if isinstance(hint, type) and Protocol in hint.__mro__:
            raise UserError(f"{given}: an object was expected, as {hint.__module__}.{hint.__name__} describes it")
        if wrong := fault_of(adapter, value):
            raise UserError(f"{given}: {wrong}")


@cache
def _types(kind: type) -> dict[str, tuple[Any, TypeAdapter[Any] | None]]:
    """The types of a constructor's arguments, with what holds a value against them."""
    hints = hints_of(kind)
    return {
        name: (hints[name], adapter_of(hints[name])) for name in inspect.signature(kind).parameters if name in hints
    }


def hints_of(function: Any) -> dict[str, Any]:
    """The types of what a function takes, or a class; a dataclass inherits some that only their own module can tell."""
    kind = next((k for k in getattr(function, "__mro__", ()) if "__init__" in vars(k)), None)
    asked = function if kind is None else kind if "__dataclass_fields__" in vars(kind) else kind.__init__
    try:
        return typing.get_type_hints(asked, include_extras=True)
    except NameError:  # a class of another package names a type that it has not imported
        return {}


def adapter_of(hint: Any) -> TypeAdapter[Any] | None:
    """What holds a value against a type; None where nothing can, before an object is made."""
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))
    except (PydanticUserError, SchemaError, TypeError):
        return None


def fault_of(adapter: TypeAdapter[Any] | None, value: Any) -> str:
    """What was expected in the place of a value; "" where it is as its type says, or nothing can tell."""
    if adapter is None:
        return ""
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        return reasons(error)
    return ""


def reasons(error: ValidationError, path: tuple[str, ...] = ()) -> str:
    """What was expected at a place, in pydantic's words; the alternatives of a union once each."""
    there = [e for e in error.errors() if e["loc"][: len(path)] == path]
    said = [each["msg"].removeprefix("Value error, ") for each in there]
    return ", or ".join(dict.fromkeys(each.replace("Input should be", "it should be") for each in said))
