"""How a tokenizer's chat template writes a dialogue: where an answer begins, and where it ends."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_rlhf.errors import UserError, say
from lit_rlhf.text.special_tokens import SpecialTokens, check, check_characters, marked
from lit_rlhf.text.template_form import (
    ANSWER,
    REASONING,
    Message,
    RenderedForm,
    TemplateForm,
    Tools,
    content_of,
    in_common,
    shared,
)
from lit_rlhf.text.template_tokens import Written, WrittenTokens

Note = Callable[[str], None]  # says a line

CLOSING = re.compile(r"</|<\w+\|>")  # what begins with the end of a thought, <channel|> say


class Template:
    """Prompts and answers as a tokenizer's chat template writes them.

    Nothing is assumed of it but that a prompt is what it writes with ``add_generation_prompt``, and an answer what it
    writes behind that when the answer is the last message. Raises ``UserError`` where it leaves out what is said.

    Args:
        tokenizer: with the template.
        special_tokens: what their names mean in people's text. "rendered": a prompt is one text, and none is applied.
        note: gets each line that a person should know of what is written, once.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, special_tokens: SpecialTokens = "plain", note: Note = say
    ) -> None:
        self.tokenizer, self.special_tokens = tokenizer, special_tokens
        self._note, self._noted = note, set[str]()
        self.tokens = WrittenTokens(tokenizer, special_tokens, self._say)
        self.form = RenderedForm(tokenizer) if special_tokens == "rendered" else TemplateForm(tokenizer)
        self._names = self.form.names

    @property
    def end(self) -> str | None:
        """The token with which it ends the assistant's turn; None where it writes none."""
        return self.form.end

    # ------------------------------------------------------------------ writing

    def prompt(self, messages: Sequence[Message], tools: Tools = None) -> Written:
        """The dialogue up to where the assistant answers."""
        (shielded, tools), mark = self._shielded([*messages], tools)
        return Written(self._prompt(shielded, tools), mark=mark)

    def dialogue(self, messages: Sequence[Message], tools: Tools = None) -> Written:
        """All of the dialogue, with what the template writes behind it."""
        (shielded, tools), mark = self._shielded([*messages], tools)
        return Written(self.form.write(shielded, tools), mark=mark)

    def turn(self, messages: Sequence[Message], answer: Message, tools: Tools = None) -> Written:
        """The dialogue up to where the assistant answers, and the answer up to the end of its turn."""
        return self._turn(messages, answer, tools)[0]

    def learned(self, messages: Sequence[Message], answer: Message, tools: Tools = None) -> Written:
        """The same, with what is learned where the template marks it itself, {% generation %} to {% endgeneration %}.

        What it marks may go beyond the end of the turn: then so does the response."""
        written, whole, tools, start = self._turn(messages, answer, tools)
        marked = None if start is None else self.form.generated(whole, tools, start)
        if start is None or marked is None:
            return written
        response, text = written.response, self.form.write(whole, tools)
        if marked == [(0, len(response))]:
            return written
        self._say(
            "this tokenizer's chat template marks other text as the assistant's ({% generation %}) than an answer "
            "and the end of its turn, up to a line break behind it say; what it marks is learned"
        )
        if marked[-1][1] > len(response) or not text.startswith(response, start):
            response = text[start : start + marked[-1][1]]
        return written._replace(response=response, learned=marked)

    def _turn(
        self, messages: Sequence[Message], answer: Message, tools: Tools
    ) -> tuple[Written, list[Message], Tools, int | None]:
        """The turn, its dialogue and tools as they were rendered, and where the response begins in that."""
        (shielded, tools), mark = self._shielded([*messages, answer], tools)
        [*before, answer] = shielded
        prompt, whole = self._at_one_time(before, shielded, tools)
        reply, start = self._reply(prompt, whole, before, answer, tools)
        _check_said(answer, reply, lambda: prompt[in_common(prompt, self.form.write(before, tools)) :])
        return Written(prompt, self.form.ended(reply), mark=mark), shielded, tools, start

    def _at_one_time(self, before: list[Message], messages: list[Message], tools: Tools) -> tuple[str, str]:
        """A prompt, and the dialogue that goes on from it: some templates write the time."""
        for _ in range(3):
            prompt, whole = self._prompt(before, tools), self.form.write(messages, tools)
            if whole.startswith(prompt) or self._prompt(before, tools) == prompt:
                return prompt, whole
        raise UserError("this tokenizer's chat template writes the same dialogue otherwise each time; set another")

    def _shielded(self, messages: list[Message], tools: Tools) -> tuple[Any, str]:
        check_characters((messages, tools))
        if self.form.developer_as_system and any(message["role"] == "developer" for message in messages):
            self._say("this tokenizer's chat template knows no 'developer': it is written as the system's message")
        if self.special_tokens == "refuse":
            check(self._names, (messages, tools))
        return marked(self.tokenizer, self._names, ([self.form.as_expected(m) for m in messages], tools))

    def _prompt(self, messages: list[Message], tools: Tools) -> str:
        if not any(message["role"] in ("user", "tool") for message in messages):
            raise UserError(f"{'only a system message' if messages else 'nothing'} stands before the assistant's turn")
        for message in messages:
            if message["role"] == "user" and not content_of(message).strip():
                raise UserError("a turn of the user is empty")
        prompt = self.form.write(messages, tools, generation_prompt=True)
        names = [str(tool.get("function", tool).get("name", "")) for tool in tools or []]
        if any(_squeezed(name) not in _squeezed(prompt) for name in names):
            self._say("this tokenizer's chat template leaves out tools that the records describe: no model sees them")
        for message in messages:
            if message["role"] != "assistant":  # of those a template may leave out what was thought
                _check_said(message, prompt)
        return prompt

    def _say(self, line: str) -> None:
        if line not in self._noted:
            self._noted.add(line)
            self._note(line)

    # ------------------------------------------------------------------ reading what was written

    def _reply(
        self, prompt: str, whole: str, before: list[Message], answer: Message, tools: Tools
    ) -> tuple[str, int | None]:
        """What ``whole`` writes behind the prompt, and where that begins in it.

        Some templates end a prompt in another way than a dialogue with its answer goes on, with an opened <think> say:
        then the answer is what comes after the part that they have in common, without what the prompt has opened. Where
        the template leaves out a part of the answer there, or writes the prompt itself anew, the answer stands as it is
        given (and nowhere in it)."""
        start = shared(prompt, whole)
        if not prompt[start:].strip():
            return whole[start:], start
        asked = in_common(prompt, self.form.write(before, tools))
        opened, goes_on = prompt[max(start, asked) :].strip(), start >= asked
        if goes_on and CLOSING.match(opened):
            raise UserError(
                f"this tokenizer's chat template ends a prompt with {prompt[asked:].strip()!r}, behind which it cannot "
                "write what an answer thinks; take that out of the data, or set another template"
            )
        blank = self.form.write([*before, self.form.as_expected({**answer, "content": ANSWER})], tools)
        start = shared(prompt, blank)
        said = content_of(answer)
        written = asked <= start and whole.startswith(blank[:start]) and _squeezed(said) in _squeezed(whole[start:])
        reply = whole[start:] if written else said + (self.form.after or "")
        if opened and reply.lstrip().startswith(opened):
            reply = reply.lstrip().removeprefix(opened).lstrip("\n")
        elif goes_on and opened.replace("<", "</") not in reply:
            self._say(
                f"this tokenizer's chat template ends a prompt with {opened!r}, and writes none before an answer: an "
                "answer that does not begin with it is learned behind it as it stands"
            )
        return reply, len(whole) - len(reply) if written else None


def _check_said(message: Message, written: str, opened: Callable[[], str] = str) -> None:
    """Whether what a message says is there, or begins in what the prompt has ``opened``, with <think> say."""
    said = {"content": content_of(message), **{key: message.get(key) for key in REASONING}}
    if message["role"] == "assistant":
        calls = [call.get("function", call) for call in message.get("tool_calls") or []]
        said |= {f"tool_calls[{i}]": call.get("name") for i, call in enumerate(calls)}
    for key, text in said.items():
        if isinstance(text, str) and not (_says(written, text) or _says(opened() + written, text)):
            raise UserError(
                f"this tokenizer's chat template leaves out '{key}' of a message of the {message['role']} "
                f"({text[:60]!r}); take it out of the data, or set another template"
            )


def _says(written: str, text: str) -> bool:
    """Whether a text, or the same as a JSON string, is in what was written; spaces do not count."""
    return any(_squeezed(form) in _squeezed(written) for form in (text, json.dumps(text, ensure_ascii=False)[1:-1]))


def _squeezed(text: str) -> str:
    """Without spaces and line breaks, of which templates take some away."""
    return "".join(text.split())
