"""Demonstrations: dialogues to imitate."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from lit_rlhf.text.records.fields import WEIGHT, looked_for, names_in, remark, short
from lit_rlhf.text.records.messages import Messages, dialogue, dialogue_name, is_learned, messages_of, text_of, tools_of
from lit_rlhf.text.records.prompts import parse_prompt


@dataclass(frozen=True)
class Demonstration:
    """A dialogue to imitate; the assistant's turns from message ``context`` on are learned, but those of weight 0."""

    messages: Messages
    context: int
    tools: list[dict[str, Any]] | None = None  # functions that the assistant may call, for the chat template
    place: str = field(default="", compare=False)  # file and line


def parse_demonstration(row: dict[str, Any]) -> Demonstration:
    """``prompt`` + ``response`` (or ``completion``), ``instruction`` [+ ``input``] + ``output``, or ``messages``
    (or ``conversations``); with ``tools`` where the assistant calls some.

    All assistant turns of ``messages`` are learned, but those whose ``weight`` is 0; of the others, the response."""
    prompt, answer = answered(row)
    _check_weights([*prompt, *answer])
    if not any(map(is_learned, answer)):
        raise ValueError("every turn of the assistant has weight 0; nothing is left to learn")
    _check_asked([*prompt, *answer])
    if any(m["role"] == "assistant" and is_learned(after) for m, after in pairwise([*prompt, *answer])):
        remark(row, "two turns of the assistant stand in a row, and each is learned as a turn of its own")
    asked: set[str] = getattr(row, "asked", set())
    asked.add(WEIGHT)
    return Demonstration([*prompt, *answer], len(prompt), tools_of(row))


def _check_weights(messages: Messages) -> None:
    for message in messages:
        weight, role = message.get("weight", 0), message["role"]
        if isinstance(weight, bool) or weight not in (0, 1):
            raise ValueError(f"a message has the weight {short(weight)}; 0 (not learned) or 1 was expected")
        if weight == 1 and role != "assistant":
            raise ValueError(f"a message of the {role} has the weight 1; only the assistant's turns can be learned")


def _check_asked(messages: Messages) -> None:
    """Whether somebody speaks before the assistant's first turn that is learned."""
    first = next(i for i, message in enumerate(messages) if is_learned(message))
    before = {message["role"] for message in messages[:first]}
    if not before & {"user", "tool"}:
        nothing = "only a system message" if before & {"system", "developer"} else "nothing"
        raise ValueError(
            f"{nothing} stands before a turn of the assistant; give it the weight 0 (it is read, and not learned)"
        )


def answered(row: dict[str, Any]) -> tuple[Messages, Messages]:
    """(prompt, what follows it): of a dialogue all is the latter."""
    name = dialogue_name(row)
    if name is not None:
        return [], _ended(dialogue(row, name), name)
    prompt = parse_prompt(row)
    for name in ("response", "completion", "output"):
        if name in row:
            response = row[name]
            if isinstance(response, list):  # conversational completion, as in TRL
                said = _ended(messages_of(response, name), name)
                return prompt, said[len(prompt) :] if said[: len(prompt)] == prompt else said  # some repeat the prompt
            if not isinstance(response, str) or not response.strip():
                raise ValueError(f"'{name}' is {short(response)}; a non-empty string was expected")
            return prompt, [{"role": "assistant", "content": response}]
    looked = looked_for(row, "response", "completion", "output")
    raise ValueError(
        f"no 'response', 'completion' or 'output'{looked} among its fields ({names_in(row)}); where the file calls it "
        "otherwise, set <stage>.data.fields='{response: NAME}'"
    )


def _ended(messages: Messages, name: str) -> Messages:
    last = messages[-1]["role"]
    if last != "assistant":
        raise ValueError(f"'{name}' ends with a turn of the {last}; a demonstration ends with the assistant's")
    for place, message in enumerate(messages, start=1):
        if message["role"] in ("user", "assistant") and not text_of(message).strip():
            raise ValueError(f"'{name}' has an empty turn of the {message['role']} (message {place})")
    return messages
