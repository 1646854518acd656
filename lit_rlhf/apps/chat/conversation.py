"""A conversation with one model, or with two that answer side by side; terminal and page only show it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from pathlib import Path
from random import Random
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from lit_rlhf.apps.chat.assistant import Assistant, fit_dialogue
from lit_rlhf.apps.chat.judgements import Judgements
from lit_rlhf.errors import UserError
from lit_rlhf.files import json_value
from lit_rlhf.rollouts import Sampling
from lit_rlhf.text.records import Messages, parse_messages, text_of
from lit_rlhf.text.special_tokens import check_characters

Choice = Literal["A", "B", "tie"]
SAMPLING = Sampling(temperature=0.7)  # of conf/chat, too


@dataclass
class Answer:
    """A model's answer, while it is written and after."""

    model: str
    prompt: Messages  # what the model saw
    sampling: Sampling
    text: str = ""
    finished: bool = False  # the model ended it; False: stopped by the person, or cut off
    rating: int = 0  # 1 thumbs up, -1 thumbs down, 0 none
    kept: dict[str, Any] | None = None  # its feedback record

    @property
    def lineage(self) -> dict[str, Any]:
        """The fields of its record that say where the answer comes from."""
        return {"model": self.model, "finished": self.finished, "sampling": asdict(self.sampling)}


class Conversation:
    """Turns, answers and judgements. With two models each turn waits for a choice between their answers.

    Args:
        assistants: one, or two to compare blind.
        judgements: where thumbs and choices are kept; None: nowhere, and there are none.
        sampling: how answers are drawn.
        seed: of the sampling; the same seed and turns give the same answers.
        system: system prompt; "" is none.
    """

    def __init__(
        self,
        assistants: Sequence[Assistant],
        judgements: Judgements | None = None,
        *,
        sampling: Sampling = SAMPLING,
        seed: int = 0,
        system: str = "",
    ) -> None:
        self.assistants, self._judgements = list(assistants), judgements
        self.sampling, self.seed, self.system = sampling, seed, system
        self.revealed = False  # whether the models' names stand beside their answers
        self.shuffle = Random()  # not from the seed: who knows it would know which model stands where
        self.clear()

    def clear(self) -> None:
        """Begin anew, with the same settings."""
        self.messages: Messages = []  # without the system prompt
        self.answers: dict[int, Answer] = {}  # place of a message -> the answer that it is
        self.choices: list[Answer] = []  # A and B, while they wait for a choice
        self.dropped = 0  # oldest messages that the last answer was given without
        self.drawn = 0  # answers so far, so that each one draws other random numbers
        self.stopped = False

    @property
    def judgements(self) -> Judgements:
        """Where thumbs and choices are kept; raises ``UserError`` where that is nowhere."""
        if self._judgements is None:
            raise UserError("this conversation keeps no judgements; give it a place (judgements=Judgements(folder))")
        return self._judgements

    @property
    def compares(self) -> bool:
        """Whether two models answer."""
        return len(self.assistants) == 2

    @property
    def names(self) -> list[str]:
        """Names of the models; of A and B, while they wait for a choice."""
        return [a.model for a in self.choices] or [assistant.name for assistant in self.assistants]

    @property
    def dropped_note(self) -> str:
        """What a person should know of messages that the last answer was given without; "" where there are none."""
        if not self.dropped:
            return ""
        return (
            f"the conversation is longer than the model's context: its {self.dropped} oldest messages were left out of "
            "this answer"
        )

    def ask(self, text: str, together: bool = False) -> Iterator[list[Answer]]:
        """Say something; yields the answer, or both, after each token. Two are written in turn, or ``together``.

        Raises ``UserError`` where the message is empty or too long; the conversation is then as it was."""
        if not text.strip():
            raise UserError("an empty message; write something")
        self.go_on()
        self.messages.append({"role": "user", "content": text})
        try:
            yield from self._reply(together)
        finally:
            if self.messages[-1]["role"] == "user" and not self.choices:
                self.messages.pop()  # there is no answer, not even the beginning of one

    def regenerate(self, together: bool = False) -> Iterator[list[Answer]]:
        """Another answer in place of the last one."""
        if not self.messages:
            raise UserError("there is no answer yet that could be given anew")
        self.choices = []
        if self.messages[-1]["role"] == "assistant":
            self.answers.pop(len(self.messages) - 1, None)
            self.messages.pop()
        yield from self._reply(together)

    def stop(self) -> None:
        """End the answers that are being written; what they hold so far stays."""
        self.stopped = True

    def choose(self, choice: Choice) -> str:
        """Keep a ranking record of A and B and go on with the better one (after a tie, with A).

        Returns what was done, for the person."""
        if not self.choices:
            raise UserError("there are no two answers to choose from")
        a, b = self.choices
        if not a.text or not b.text or a.text == b.text:
            self.go_on()
            return "nothing was kept: " + ("both answers are the same" if a.text == b.text else "an answer is empty")
        ranks = {"A": [1, 2], "B": [2, 1], "tie": [1, 1]}[choice]
        self.judgements.ranking(
            {
                "prompt": a.prompt,
                "responses": [a.text, b.text],
                "ranks": ranks,
                "models": [a.model, b.model],
                "finished": [a.finished, b.finished],
                "sampling": asdict(a.sampling),
                "blind": not self.revealed,
            }
        )
        self.go_on(0 if choice != "B" else 1)
        return f"kept in {self.judgements.labels_file}"

    def go_on(self, place: int = 0) -> None:
        """Where a choice is open, leave it and go on with one of the two answers."""
        if self.choices:
            self._add(self.choices[place])
            self.choices = []

    def rate(self, rating: Literal[1, 0, -1], place: int = -1) -> str:
        """Thumbs up or down for the answer at a place of ``messages``; 0 takes them back. Returns what was done."""
        place = place % len(self.messages) if self.messages else 0
        answer = self.answers.get(place)
        if answer is None:
            raise UserError("choose between A and B first" if self.choices else "there is no answer here to rate")
        if not answer.text:
            raise UserError("an empty answer cannot be rated")
        if answer.rating == rating:
            return "already kept" if rating else "no thumb to take back"
        if rating:
            record = answer.kept or {"prompt": answer.prompt, "response": answer.text, **answer.lineage}
            answer.kept = self.judgements.feedback({**record, "rating": rating}, answer.kept)
        elif answer.kept:
            self.judgements.take_back(answer.kept)
            answer.kept = None
        answer.rating = rating
        return f"kept in {self.judgements.feedback_file}" if rating else "taken back"

    def set_sampling(self, **changes: Any) -> None:
        """Change how answers are drawn from here on; raises ``UserError`` where a value is out of range."""
        try:
            self.sampling = TypeAdapter(Sampling).validate_python({**asdict(self.sampling), **changes})
        except ValidationError as error:
            first = error.errors()[0]
            said = dict.fromkeys(each["msg"].replace("Input should be", "it should be") for each in error.errors())
            raise UserError(f"{first['loc'][0]}={first['input']}: {', or '.join(said)}") from None

    def reseed(self, seed: int) -> None:
        """Draw the next answers from another seed."""
        self.seed, self.drawn = seed, 0

    def to_json(self) -> str:
        """The dialogue as a list of messages; an answer also names its model."""
        turns: list[dict[str, str]] = [{"role": "system", "content": self.system}] if self.system else []
        for place, message in enumerate(self.messages):
            answer = self.answers.get(place)
            turns.append({**message, "model": answer.model} if answer else message)
        return json.dumps(turns, ensure_ascii=False, indent=2) + "\n"

    def load(self, path: str | Path) -> None:
        """Go on with a dialogue in a file; raises ``UserError`` and changes nothing where it is none."""
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"{path}: no conversation could be loaded from there ({reason})") from None
        self.from_json(text, f"{path}: ")

    def from_json(self, text: str, source: str = "") -> None:
        """Go on with what ``to_json`` gave; the thumbs are those on disk. Raises as ``load`` does."""
        try:
            turns = parse_messages({"messages": json_value(text)})
            check_characters(turns)
            messages = [{"role": turn["role"], "content": text_of(turn)} for turn in turns]
            system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
            if [m["role"] for m in messages] != [("user", "assistant")[i % 2] for i in range(len(messages))]:
                raise ValueError("after a system message, user and assistant were expected in turn")
            if any(turn.get("tool_calls") for turn in turns):
                raise ValueError("an answer calls tools, which chat has none of")
        except ValueError as error:
            raise UserError(f"{source}no conversation could be loaded from there ({error})") from None
        thumbs = self._judgements.thumbs() if self._judgements else []
        self.clear()
        self.messages, self.system = messages, system
        models = [turn.get("model", "") for turn in turns if turn["role"] != "system"]
        for place, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self._with_system(messages[:place])
                answer = Answer(str(models[place]), prompt, self.sampling, message["content"], True)
                same = [t for t in thumbs if (t.get("prompt"), t.get("response")) == (prompt, answer.text)]
                answer.kept = next((t for t in reversed(same) if t.get("model") == answer.model), None)
                answer.rating = answer.kept["rating"] if answer.kept else 0
                self.answers[place] = answer

    def _reply(self, together: bool) -> Iterator[list[Answer]]:
        prompt, self.dropped = fit_dialogue(self._with_system(self.messages), self.assistants, self.sampling)
        order = self.shuffle.sample(range(len(self.assistants)), len(self.assistants))
        written = [Answer(self.assistants[i].name, prompt, self.sampling) for i in order]
        streams = [self._write(i, answer) for i, answer in zip(order, written)]
        self.stopped = False
        self.drawn += 1
        try:
            for _ in zip_longest(*streams) if together else chain(*streams):
                yield written
                if self.stopped:
                    break
        finally:  # an answer that was stopped, by whatever, is an answer so far
            for stream in streams:
                stream.close()
            if self.compares:
                self.choices = written
            else:
                self._add(written[0])

    def _write(self, index: int, answer: Answer) -> Iterator[None]:
        grown = self.assistants[index].answer(answer.prompt, answer.sampling, (self.seed, self.drawn, index))
        with closing(grown):
            for answer.text, answer.finished in grown:
                yield

    def _add(self, answer: Answer) -> None:
        self.messages.append({"role": "assistant", "content": answer.text})
        self.answers[len(self.messages) - 1] = answer

    def _with_system(self, messages: Messages) -> Messages:
        return [{"role": "system", "content": self.system}, *messages] if self.system else list(messages)
