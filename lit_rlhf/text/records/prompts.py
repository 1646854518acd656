"""Plain texts, and prompts: what a model is asked."""

from __future__ import annotations

from typing import Any, NamedTuple

from lit_rlhf.text.records.fields import Row, remark, require, short, text_field
from lit_rlhf.text.records.messages import (
    TRANSCRIPT,
    TRANSCRIPT_END,
    Messages,
    dialogue,
    dialogue_name,
    messages_of,
    parse_transcript,
    tools_of,
    with_system,
)


def parse_text(row: dict[str, Any]) -> str:
    """``text``."""
    return text_field(row, "text")


def parse_prompt(row: dict[str, Any]) -> Messages:
    """``prompt`` (a string or messages), ``instruction`` [+ ``input``], or ``messages`` (or ``conversations``).

    A final assistant turn of ``messages`` is dropped; ``system`` becomes the system message."""
    name = dialogue_name(row)
    if name is not None:
        messages = dialogue(row, name)
        return _checked(messages[:-1] if messages[-1]["role"] == "assistant" else messages, name)
    return parse_prompt_apart(row)


def parse_prompt_apart(row: dict[str, Any]) -> Messages:
    """:func:`parse_prompt` of a record whose answers stand in other fields: ``prompt``, ``instruction``, or a list of
    messages as ``context``."""
    if "instruction" in row:
        return with_system(row, instruction_of(row))
    if "prompt" not in row and isinstance(dict.get(row, "context"), list):
        return with_system(row, _prompt(row, "context"))
    return with_system(row, _prompt(row, "prompt"))


class PromptRecord(NamedTuple):
    """A prompt, and the other fields of its record, which reward functions get to see; of them ``tools`` go to the
    chat template, too."""

    messages: Messages
    others: dict[str, Any]
    place: str = ""  # file and line


def parse_prompt_record(row: dict[str, Any]) -> PromptRecord:
    """:func:`parse_prompt`, with the fields that are not part of the prompt."""
    row = row if isinstance(row, Row) else Row(row)
    prompt = parse_prompt(row)
    others = {name: v for name, v in row.items() if name not in {*row.asked, "prompt", "messages"}}
    if tools := tools_of(row):
        others["tools"] = tools
    return PromptRecord(prompt, others)


def _prompt(row: dict[str, Any], name: str) -> Messages:
    value = require(row, name)
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"'{name}' is empty")
        messages = [{"role": "user", "content": value}]
        if value.startswith(TRANSCRIPT) and value.endswith(TRANSCRIPT_END):
            messages = parse_transcript(value)
            remark(row, f"'{name}' is a transcript from Human: to Assistant:, and is read as its turns")
    else:
        messages = messages_of(value, name)
    return _checked(messages, name)


def _checked(messages: Messages, name: str) -> Messages:
    if messages and messages[-1]["role"] == "assistant":
        raise ValueError(f"'{name}' ends with a turn of the assistant; a prompt ends with the user's")
    if all(message["role"] in ("system", "developer") for message in messages):
        raise ValueError(f"'{name}' has no turn of the user; a prompt ends with one")
    return messages


def instruction_of(row: dict[str, Any]) -> Messages:
    """The prompt of ``instruction`` and, below it, ``input``."""
    instruction = text_field(row, "instruction")
    context = row.get("input") or ""
    if not isinstance(context, str):
        raise ValueError(f"'input' is {short(context)}; a string was expected")
    return [{"role": "user", "content": f"{instruction}\n\n{context}" if context.strip() else instruction}]
