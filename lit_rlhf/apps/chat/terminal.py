"""Chat in a terminal: plain lines, commands that begin with a slash, Ctrl-C stops an answer."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from lit_rlhf.apps.chat.conversation import Answer, Conversation
from lit_rlhf.apps.display import printable
from lit_rlhf.errors import UserError
from lit_rlhf.text.special_tokens import check_characters

PLAIN, BOLD, SOFT = "\x1b[0m", "\x1b[1m", "\x1b[2m"


class Terminal:
    """Reads lines and commands, writes answers as they grow.

    Works on a pipe too: then there are no colours, and the lines that were read are repeated."""

    def __init__(self, conversation: Conversation, source: TextIO | None = None, sink: TextIO | None = None) -> None:
        self.conversation = conversation
        self.source, self.sink = source or sys.stdin, sink or sys.stdout
        self.styled = self.sink.isatty() and "NO_COLOR" not in os.environ
        self.commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/help": (self._help, "these lines"),
            "/regen": (self._regenerate, "another answer in place of the last one"),
            "/up": (lambda _: self._say(self.conversation.rate(1)), "thumbs up for the last answer"),
            "/down": (lambda _: self._say(self.conversation.rate(-1)), "thumbs down"),
            "/new": (self._new, "begin a new conversation"),
            "/system": (self._system, "set the system prompt; without a text, show it; /system none removes it"),
            "/temp": (
                self._setting("temperature", "temperature {:g}"),
                "set the temperature; 0 takes the most likely token",
            ),
            "/top_p": (self._setting("top_p", "top-p {:g}"), "set top-p, at most 1"),
            "/tokens": (
                self._setting("max_new_tokens", "up to {} tokens per answer"),
                "set how many tokens an answer may have",
            ),
            "/seed": (self._seed, "draw the next answers from this seed"),
            "/save": (self._save, "save the conversation to a file (JSON)"),
            "/load": (self._load, "go on with a saved conversation"),
            "/quit": (self._quit, "leave; so does Ctrl-D"),
        }
        if conversation.compares:
            self.commands = {
                "/a": (lambda _: self._say(self.conversation.choose("A")), "A is better"),
                "/b": (lambda _: self._say(self.conversation.choose("B")), "B is better"),
                "/tie": (lambda _: self._say(self.conversation.choose("tie")), "both are equally good"),
                "/names": (self._names, "show which model is which, or hide it again"),
                **self.commands,
            }

    def run(self) -> None:
        """Until the person leaves or the input ends."""
        if isinstance(self.source, TextIOWrapper):
            self.source.reconfigure(errors="surrogateescape")  # what is no UTF-8 is said of its line, and no more
        self._greet()
        while True:
            try:
                line = self._read()
            except EOFError:
                self._line()
                return
            except KeyboardInterrupt:
                self._line()
                self._say("/quit or Ctrl-D leaves")
                continue
            try:
                self._do(line.strip())
            except UserError as error:
                self._say(str(error))
            except KeyboardInterrupt:
                self._line()
                self._say("stopped")
            except _Leave:
                return

    def _do(self, line: str) -> None:
        if not line:
            return
        check_characters(line)
        if not line.startswith("/"):
            self._show(self.conversation.ask(line))
            return
        name, _, rest = line.partition(" ")
        if name not in self.commands:
            raise UserError(f"there is no {name}; /help lists what there is")
        self.commands[name][0](rest.strip())

    def _show(self, growing: Iterator[list[Answer]]) -> None:
        """Write the answers as they grow, one below the other."""
        shown: list[str] = []  # of each answer, as far as it stands on the terminal
        with closing(growing):  # type: ignore[type-var]  # Ctrl-C ends the answer, and the conversation keeps it
            for answers in growing:
                for place, answer in enumerate(answers):
                    if len(shown) == place and (place == 0 or answer.text or answer.finished):
                        if place:
                            self._line()
                        self._write(self._label(place, answer), BOLD)
                        shown.append("")
                    if len(shown) == place + 1:
                        self._write(printable(answer.text[len(shown[place]) :]))
                        shown[place] = answer.text
        self._line()
        if self.conversation.dropped_note:
            self._say(self.conversation.dropped_note)
        if self.conversation.choices:
            self._say("which is better? /a, /b or /tie; or just go on, with A")

    def _label(self, place: int, answer: Answer) -> str:
        if not self.conversation.compares:
            return f"{answer.model}: "
        return f"{'AB'[place]} ({answer.model}): " if self.conversation.revealed else f"{'AB'[place]}: "

    def _greet(self) -> None:
        names = self.conversation.names
        who = f"two models, blind: {' and '.join(sorted(names))}" if self.conversation.compares else names[0]
        self._write(f"Talking to {who}.", BOLD)
        self._line()
        self._say("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")

    def _help(self, _: str) -> None:
        for name, (_command, about) in self.commands.items():
            self._write(f"{name:9}", BOLD)
            self._write(about + "\n")

    def _regenerate(self, _: str) -> None:
        self._show(self.conversation.regenerate())

    def _names(self, _: str) -> None:
        self.conversation.revealed = not self.conversation.revealed
        if not self.conversation.revealed:
            self._say("the names are hidden again from the next answers on")
        elif self.conversation.choices:
            self._say(", ".join(f"{'AB'[i]} is {name}" for i, name in enumerate(self.conversation.names)))
        else:
            self._say("the names will stand beside the next answers")

    def _new(self, _: str) -> None:
        self.conversation.clear()
        self._say("a new conversation")

    def _system(self, text: str) -> None:
        if text:
            self.conversation.system = "" if text == "none" else text
        self._say(f"system prompt: {printable(self.conversation.system) or 'none'}")

    def _setting(self, name: str, said: str) -> Callable[[str], None]:
        """The command that sets how answers are sampled; without a value it says what is set."""

        def command(text: str) -> None:
            if text:
                self.conversation.set_sampling(**{name: text})
            self._say(said.format(getattr(self.conversation.sampling, name)))

        return command

    def _seed(self, text: str) -> None:
        if text and not text.isdecimal():
            raise UserError(f"{text}: a whole number was expected")
        if text:
            self.conversation.reseed(int(text))
        self._say(f"seed {self.conversation.seed}")

    def _save(self, name: str) -> None:
        path = Path(name or "conversation.json").expanduser()
        try:
            path.write_text(self.conversation.to_json(), encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: could not be written ({error.strerror})") from None
        self._say(f"saved to {path}")

    def _load(self, name: str) -> None:
        self.conversation.load(name or "conversation.json")
        for place, message in enumerate(self.conversation.messages):
            answer = self.conversation.answers.get(place)
            self._write(f"{(answer.model or 'assistant') if answer else 'you'}: ", BOLD)
            self._write(printable(message["content"]) + "\n")

    def _quit(self, _: str) -> None:
        raise _Leave

    def _read(self) -> str:
        if self.source is sys.stdin and self.source.isatty():
            import readline  # noqa: F401  # input() then has arrow keys and a history

            return input("you: ")
        line = self.source.readline()
        if not line:
            raise EOFError
        self._write(f"you: {printable(line.rstrip())}\n")
        return line

    def _say(self, text: str) -> None:
        self._write(f"[{text}]\n", SOFT)

    def _line(self) -> None:
        self._write("\n")

    def _write(self, text: str, style: str = "") -> None:
        self.sink.write(f"{style}{text}{PLAIN}" if style and self.styled else text)
        self.sink.flush()


class _Leave(Exception):
    """The person has had enough."""
