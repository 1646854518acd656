"""Fields of a record: how they are asked for, under which names they stand in a file, and which nobody asks for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

# What messages have for a chat template; of other fields of theirs it is said that only the template gets them.
MESSAGE_FIELDS = {
    "role", "content", "from", "value", "name", "tool_calls", "tool_call_id", "function_call", "reasoning_content",
    "reasoning", "thinking",
}  # fmt: skip

WEIGHT = "weight of a message"  # as it stands among the fields that were asked for

# What our own stages write beside a record is not news to anyone: answers that were drawn, judgements of people.
_OURS = {
    frozenset({"sampling", "round"}): {"split", "equal"},
    frozenset({"item", "turn", "shown"}): {"item", "turn", "time", "seconds", "note", "shown", "aside", "again"},
}


class Row(dict[str, Any]):
    """A record as it stands in a file; it knows which of its fields were asked for.

    A field that is null is not ``in`` it: tables have all columns in each row.

    Args:
        values: the record.
        fields: our name of a field -> its name in the file; "a.b" is the field ``b`` inside of ``a``.
    """

    def __init__(self, values: Mapping[str, Any], fields: Mapping[str, str] | None = None) -> None:
        self.names = dict(fields or {})
        taken = set(self.names.values())
        left = dict(_left(values, taken)) if taken else values
        found = {name: inside(values, address) for name, address in self.names.items()}
        ours = {name: value for name, value in found.items() if value is not None}
        hidden = {f"{name} (the file's own)": value for name, value in left.items() if name in ours}
        super().__init__({**left, **hidden, **ours})
        self.found = ours.keys()  # our names of the fields that it has under another name
        self.asked: set[str] = set()
        self.remarks: list[str] = []  # what is to be said of records like this one, with their count

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and super().get(name) is not None

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)

    def unread(self) -> Iterator[str]:
        """Names, as in the file, of the fields with a value that nobody has asked for."""
        ours = {name for mark, names in _OURS.items() if mark <= self.keys() for name in names}
        for name, value in self.items():
            if name not in self.asked and name not in ours and value is not None:
                yield self.names.get(name, str(name))

    def passed_on(self) -> Iterator[str]:
        """Names of the fields of this record's messages that only a chat template can make something of."""
        for name, value in self.items():
            if name in self.asked and isinstance(value, list):
                for message in value:
                    if isinstance(message, dict) and ("role" in message or "from" in message):
                        fields = (k for k, v in message.items() if k not in MESSAGE_FIELDS and v is not None)
                        yield from (k for k in fields if k != "weight" or WEIGHT not in self.asked)


def remark(row: Mapping[str, Any], line: str) -> None:
    """Have it said, once for a file and with their count, what was made of records like this one."""
    getattr(row, "remarks", []).append(line)


def inside(values: Mapping[str, Any], address: str) -> Any:
    """The value at an address, "a.b"; None where there is none."""
    if address in values:
        return values[address]
    first, _, rest = address.partition(".")
    within = values.get(first)
    return inside(within, rest) if rest and isinstance(within, dict) else None


def _left(values: Mapping[str, Any], taken: set[str], before: str = "") -> Iterator[tuple[str, Any]]:
    """(address, value) of what is left of a record without the addresses that were taken."""
    for name, value in values.items():
        address = f"{before}{name}"
        if address in taken:
            continue
        if isinstance(value, dict) and any(other.startswith(f"{address}.") for other in taken):
            yield from _left(value, taken, f"{address}.")
        else:
            yield address, value


def require(row: Mapping[str, Any], name: str) -> Any:
    """The value of a field; ``ValueError`` where it is missing or null."""
    value = row.get(name)
    if value is None:
        raise ValueError(
            f"no field '{name}'{looked_for(row, name)} (it has {names_in(row) or 'none'}); where the file calls it "
            f"otherwise, set <stage>.data.fields='{{{name}: NAME}}'"
        )
    return value


def looked_for(row: Mapping[str, Any], *names: str) -> str:
    """For a message: what fields that a record does not have are called in the file, as somebody said; else ""."""
    known = getattr(row, "names", {})
    return "".join(f", looked for as {known[name]!r}" for name in names if name in known)


def names_in(row: Mapping[str, Any]) -> str:
    """The names of a record's fields, for a message."""
    return ", ".join(f"{name} (null)" if value is None else str(name) for name, value in row.items())


def text_field(row: Mapping[str, Any], name: str) -> str:
    """A field that holds a text; ``ValueError`` where it does not, or is empty."""
    value = require(row, name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"'{name}' is {short(value)}; a non-empty string was expected")
    return value


def number(value: Any, name: str, what: str = "a number") -> float:
    """A finite number, which a CSV file gives as a text; ``ValueError`` says what was expected."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):  # the last of whole numbers with more than 308 digits
        found = math.nan
    if isinstance(value, bool) or not math.isfinite(found):
        raise ValueError(f"'{name}' is {short(value)}; {what} was expected")
    return found


def short(value: Any) -> str:
    """A value for a message of one line."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested deeply, or a number of thousands of digits
        text = f"a {type(value).__name__}, too large to be shown"
    return text if len(text) <= 60 else text[:57] + "..."
