"""Messages: what was said by whom, in the forms that people have them in.

OpenAI's (``role``, ``content``), ShareGPT's (``from``, ``value``), and transcripts of Human: and Assistant: turns."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from lit_rlhf.files import json_value
from lit_rlhf.text.records.fields import require, short

Message = dict[str, Any]
Messages = list[Message]  # {"role": one of ROLES, "content": str, a list of text parts, or None beside "tool_calls"}

ROLES = ("system", "developer", "user", "assistant", "tool")
DIALOGUES = ("messages", "conversations", "conversation")  # names of the field that holds a dialogue
_OTHER_NAMES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "observation": "tool", "function": "tool", "function_response": "tool", "tool_response": "tool",
}  # fmt: skip


def parse_messages(row: dict[str, Any]) -> Messages:
    """``messages`` (or ``conversations``), whoever has the last word."""
    name = dialogue_name(row)
    return dialogue(row, name) if name is not None else messages_of(require(row, "messages"), "messages")


def dialogue_name(row: dict[str, Any]) -> str | None:
    """The field that holds the record's dialogue; None where it has none."""
    return next((name for name in DIALOGUES if dict.get(row, name) is not None), None)  # which is not asking for it


def dialogue(row: dict[str, Any], name: str) -> Messages:
    """The dialogue of a record, with the system message that some forms have in a field of its own."""
    return with_system(row, messages_of(require(row, name), name))


def with_system(row: dict[str, Any], messages: Messages) -> Messages:
    """The messages behind the one in the record's field ``system``, where it has such a field."""
    system = row.get("system")
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise ValueError(f"'system' is {short(system)}; a string was expected")
    if messages[0]["role"] == "system":
        if text_of(messages[0]) != system:
            raise ValueError(f"two system messages: {short(system)} in 'system', and {short(text_of(messages[0]))}")
        return messages
    return [{"role": "system", "content": system}, *messages]


def messages_of(value: Any, name: str) -> Messages:
    """The messages in a list of OpenAI's or ShareGPT's; ``ValueError`` says which is none."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"'{name}' is {short(value)}; a non-empty list of messages was expected")
    return [_message(message, name) for message in value]


def _message(value: Any, name: str) -> Message:
    called, expected = "role", ", ".join(ROLES[:-1])
    if isinstance(value, dict) and "from" in value and "role" not in value:
        called, expected = "speaker ('from')", "human, gpt, system, function_call"
        value = {"role": value["from"], "content": value.get("value"), **value}
        value = {key: v for key, v in value.items() if key not in ("from", "value")}
        if value["role"] in ("function_call", "tool_call"):
            value = {**value, "role": "assistant", "content": "", "tool_calls": _written_calls(value["content"], name)}
    if not isinstance(value, dict) or "role" not in value:
        raise ValueError(f"'{name}' holds {short(value)}; each message needs 'role' and 'content'")
    role = value["role"]
    role = _OTHER_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise ValueError(f"'{name}' has the {called} {short(role)}; {expected} or tool was expected")
    # Arrow gives all messages the fields of each of them: null is as good as absent.
    message = {**{key: v for key, v in value.items() if v is not None}, "role": role}
    calls = message.pop("function_call", None)  # what OpenAI had before there were several
    calls = message.get("tool_calls") if calls is None else [calls]
    if calls:
        message["tool_calls"] = [_call(call, name) for call in _list(calls, name)]
    message["content"] = _content(message, name)
    return message


def answer_turn(text: str) -> Message:
    """A text as a turn of the assistant."""
    return {"role": "assistant", "content": text}


def is_plain(message: Message) -> bool:
    """Whether a message is a text and no more: no calls of tools, no thought."""
    return message.keys() <= {"role", "content"}


def is_learned(message: Message) -> bool:
    """Whether a message is a turn of the assistant that is to be imitated: its ``weight`` (OpenAI's) is not 0."""
    return message["role"] == "assistant" and message.get("weight") != 0


def _content(message: Message, name: str) -> str | list[dict[str, Any]] | None:
    content = message.get("content")
    if isinstance(content, str) or (content is None and message.get("tool_calls") and message["role"] == "assistant"):
        return content
    if not isinstance(content, list):
        raise ValueError(f"'{name}' holds {short(message)}; each message needs 'role' and 'content'")
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else part
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"'{name}' has content of the type {short(kind)}; parts of text were expected")
    return [{key: v for key, v in part.items() if v is not None} for part in parts]


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"'{name}' has the tool_calls {short(value)}; a list was expected")
    return value


def _call(call: Any, name: str) -> dict[str, Any]:
    """A call as templates want it: under ``function``, its arguments an object, which OpenAI writes as a text."""
    if isinstance(call, dict) and "function" not in call:
        call = {"function": call}
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        expected = "'function' with 'name' and 'arguments' was expected"
        raise ValueError(f"'{name}' has the tool call {short(call)}; {expected}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json_value(arguments or "{}")
        except ValueError as error:
            raise ValueError(f"'{name}' has a call of {function['name']} whose arguments are {error}") from None
    arguments = {} if arguments is None else arguments
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}


def _written_calls(text: Any, name: str) -> list[Any]:
    """The calls that ShareGPT's ``function_call`` writes as JSON: one, or a list."""
    try:
        calls = json_value(text) if isinstance(text, str) else text
    except ValueError as error:
        raise ValueError(f"'{name}' has a function_call that is {error}") from None
    return calls if isinstance(calls, list) else [calls]


def text_of(message: Message) -> str:
    """The text of a message: its content, or the texts of its parts, and the calls of tools as they were made."""
    content = message.get("content")
    text = content if isinstance(content, str) else "".join(part["text"] for part in content or [])
    return text if not message.get("tool_calls") else f"{text}{_calls(message['tool_calls'])}"


def _calls(calls: Sequence[dict[str, Any]]) -> str:
    return json.dumps([call.get("function", call) for call in calls], ensure_ascii=False, sort_keys=True, default=str)


def tools_of(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The tools that a record describes (``tools``), a list or the JSON of one; None where it has none."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json_value(tools)
        except ValueError as error:
            raise ValueError(f"'tools' is {error}") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"'tools' is {short(tools)}; a list of functions was expected")
    return tools


def shown(messages: Sequence[Message]) -> str:
    """A prompt as text for messages and pages: its turns one after the other."""
    return " / ".join(map(text_of, messages))


TRANSCRIPT, TRANSCRIPT_END = "\n\nHuman:", "\n\nAssistant:"  # around a prompt that is one, where it may be any text
TURN = re.compile(r"\s*(Human|Assistant):")  # how one begins, where nothing else may stand


def parse_transcript(text: str) -> Messages:
    """Messages of a transcript ``\\n\\nHuman: ... \\n\\nAssistant: ...`` (hh-rlhf)."""
    pieces = re.split(r"(?:^|\n\n)\s*(Human|Assistant):", text)
    if len(pieces) < 3 or pieces[0].strip():
        raise ValueError(f"{short(text)} is not a transcript of Human: and Assistant: turns")
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = [{"role": roles[r], "content": c.strip()} for r, c in zip(pieces[1::2], pieces[2::2])]
    # A transcript that ends with an open "Assistant:" is a prompt.
    return messages[:-1] if messages[-1]["role"] == "assistant" and not messages[-1]["content"] else messages


def transcript_tail(messages: Messages) -> str:
    """An answer of several turns as one text: the first one's, then the others with who spoke."""
    names = {"user": "Human"}
    first, *rest = messages
    return text_of(first) + "".join(f"\n\n{names.get(m['role'], m['role'].capitalize())}: {text_of(m)}" for m in rest)
