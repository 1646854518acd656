"""Chat templates, and dialogues as tokens.

A template turns messages into one string; it is saved with the tokenizer, so that every tool prompts per model as it
was trained. A base model has one too: it only writes the turns below each other."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lit_rlhf.errors import UserError, say
from lit_rlhf.text.records import Message, Messages, answer_turn, is_learned, text_of
from lit_rlhf.text.special_tokens import Pieces, SpecialTokens, text_start
from lit_rlhf.text.template import Note, Template
from lit_rlhf.text.template_form import Tools, content_of
from lit_rlhf.text.template_tokens import Written
from lit_rlhf.text.tokenizer import ROLES

Item = TypeVar("Item")

# A model that has only seen text has no roles: it goes on where the text stops.
BASE_TEMPLATE = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"
WORLD_MARK = "{# the built-in world #}"  # in front of it where that text was the built-in world's


def _template(name: str) -> str:
    """A template of the folder ``templates``, as one line: line breaks and indents in it are for people."""
    text = (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    return "".join(map(str.strip, text.splitlines()))


# The space before each text makes its first word the same token as inside a sentence.
ROLE_TEMPLATE = _template("roles")
TRANSCRIPT_TEMPLATE = _template("hh_transcript")  # for checkpoints without role tokens: hh-rlhf's form, in plain text


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a base model's tokenizer a chat template; one that already has one of its own keeps it."""
    if is_base(tokenizer):
        has_roles = all(role in tokenizer.get_vocab() for role in ROLES)
        tokenizer.chat_template = behind_start(tokenizer, ROLE_TEMPLATE if has_roles else TRANSCRIPT_TEMPLATE)


def ensure_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer without a chat template that of a base model, which writes turns below each other."""
    if tokenizer.chat_template is None:
        tokenizer.chat_template = behind_start(tokenizer, BASE_TEMPLATE)


def behind_start(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """A template of ours behind what the tokenizer puts in front of a text, which it leaves out of templates."""
    start = json.dumps("".join(tokenizer.convert_ids_to_tokens(text_start(tokenizer))), ensure_ascii=False)
    return template if start == '""' else f"{{{{ {start} }}}}{template}"


@dataclass(frozen=True)
class Transcript:
    """A written conversation, which a base model continues: text alone makes it a weak assistant (GPT-3, 2.1).

    The template opens with ``opening`` (or with the dialogue's system message) and ``examples``; each turn begins with
    the speaker's name. A base model does not end its turn but goes on with the human's, so generation must stop before
    one of :attr:`stops`."""

    opening: str = ""  # the first paragraph; "": there is none
    examples: Sequence[dict[str, Any]] = ()  # messages that stand before the dialogue: one or several turns each
    human: str = "Human:"
    assistant: str = "Assistant:"
    between: str = "\n\n"  # stands between two turns
    end: str = ""  # where an answer is over too; "": at the next turn only

    def __str__(self) -> str:
        examples = f" and {len(self.examples)} turns as examples" if self.examples else ""
        return f'a transcript of "{self.human}" and "{self.assistant}"{examples}'

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop texts of an answer: the next turn, whoever takes it."""
        return *filter(None, [self.end]), "\n" + self.human, "\n" + self.assistant

    def answer(self, text: str) -> str:
        """The assistant's turn of what a base model wrote."""
        names = "|".join(map(re.escape, (self.human, self.assistant)))
        turn = re.split(f"^(?:{names})", text.strip(), maxsplit=1, flags=re.MULTILINE)[0]
        return (turn.partition(self.end)[0] if self.end else turn).strip()

    @property
    def template(self) -> str:
        """The chat template; the dialogue's own text is never read as a part of it."""
        names = {"user": self.human, "assistant": self.assistant}
        examples = "".join(f"{names[m['role']]} {m['content']}{self.between}" for m in self.examples)
        texts = {
            "opening": self.opening,
            "human": self.human,
            "assistant": self.assistant,
            "between": self.between,
            "examples": examples,
        }
        given = [f"{{% set {name} = {json.dumps(text, ensure_ascii=False)} %}}" for name, text in texts.items()]
        return "".join([*given, _template("transcript")])

    def text(self, messages: Messages) -> str:
        """A dialogue as it is written, with the calls of tools as JSON."""
        plain = [{"role": m["role"], "content": text_of(m)} for m in messages]
        return str(render_jinja_template(conversations=[plain], chat_template=self.template)[0][0])

    def prompting(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """A copy of ``tokenizer`` that writes dialogues like this."""
        prompting = copy.deepcopy(tokenizer)
        prompting.chat_template = behind_start(tokenizer, self.template)
        return prompting


def is_base(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a model has learned no dialogues: its tokenizer has no chat template of its own."""
    template = tokenizer.chat_template
    return template is None or (isinstance(template, str) and template.endswith(BASE_TEMPLATE))


class Encoded(NamedTuple):
    """A dialogue as tokens, with the tokens that the model is to learn."""

    tokens: list[int]
    mask: list[bool]  # True = a token of a response, the end of the assistant's turn included


# What is done about a dialogue that cannot be encoded, (its place among those given, the reason): it has no tokens then
Refuse = Callable[[int, str], None]


def turn_end(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The token with which the chat template ends the assistant's turn; empty where it writes none, or there is none.

    Raises ``UserError`` where the template cannot write a question and an answer, or leaves out what they say."""
    end = Template(tokenizer).end if tokenizer.chat_template is not None else None
    return frozenset() if end is None else frozenset([cast(int, tokenizer.convert_tokens_to_ids(end))])


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    tools: Sequence[Tools] | None = None,
    *,
    special_tokens: SpecialTokens = "plain",
    refuse: Refuse | None = None,
    note: Note = say,
) -> list[list[int]]:
    """Tokens of each prompt up to where the assistant answers: ``apply_chat_template(add_generation_prompt=True)``.

    ``tools`` are those of each prompt. ``special_tokens``: what their names mean in what people wrote. Raises
    ``UserError`` where the template refuses a prompt or leaves out what it says, or calls ``refuse`` instead. ``note``
    gets lines that a person should know."""
    if not prompts:
        return []
    template = Template(tokenizer, special_tokens, note)
    written = _each(zip(prompts, tools or [None] * len(prompts)), template.prompt, refuse)
    tokens = iter(template.tokens.prompts([w for w in written if w is not None]))
    return [[] if w is None else next(tokens) for w in written]


def encode_whole(
    tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Messages], tools: Sequence[Tools] | None = None
) -> list[list[int]]:
    """Tokens of each dialogue as its template writes it, to its end: ``apply_chat_template``, but that names of special
    tokens in what was said are characters.

    What a template leaves out of it, a thought say, is left out."""
    if not dialogues:
        return []
    template = Template(tokenizer)
    return template.tokens.prompts([*map(template.dialogue, dialogues, tools or [None] * len(dialogues))])


def encode_responses(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    responses: Sequence[str | Message],
    tools: Sequence[Tools] | None = None,
    *,
    special_tokens: SpecialTokens = "plain",
    refuse: Refuse | None = None,
    note: Note = say,
) -> list[list[int]]:
    """Tokens of each response as the template writes it behind its prompt, up to the end of the assistant's turn.

    A response is a text, or a message, of which calls and thoughts are written, too. The other arguments are those of
    :func:`encode_prompts`."""
    if not prompts:
        return []
    template = Template(tokenizer, special_tokens, note)
    answers = [answer_turn(response) if isinstance(response, str) else response for response in responses]
    turns = _each(zip(prompts, answers, tools or [None] * len(prompts)), template.turn, refuse)
    tokens = iter(template.tokens.responses([turn for turn in turns if turn is not None]))
    return [[] if turn is None else next(tokens).tokens for turn in turns]


def encode_dialogues(
    tokenizer: PreTrainedTokenizerBase,
    dialogues: Sequence[Messages],
    contexts: Sequence[int],
    tools: Sequence[Tools] | None = None,
    *,
    special_tokens: SpecialTokens = "plain",
    refuse: Refuse | None = None,
    note: Note = say,
) -> list[list[Encoded]]:
    """Examples to learn from: the assistant's turns of each dialogue, from message ``contexts[i]`` on, but those whose
    ``weight`` is 0.

    A turn is learned behind the very prompt that would be asked for it: the tokens of :func:`encode_prompts`, then the
    response's. A dialogue is one example as long as each prompt goes on from the turn before; where the template writes
    earlier turns anew when one is added (Qwen3 and others leave out what was thought), another example begins.

    The other arguments are those of :func:`encode_prompts`."""
    if not dialogues:
        return []
    template = Template(tokenizer, special_tokens, note)

    def turns(messages: Messages, context: int, tools: Tools) -> list[Written]:
        mine = [j for j, m in enumerate(messages) if is_learned(m) and j >= context]
        if any(not content_of(messages[j]).strip() and not messages[j].get("tool_calls") for j in mine):
            raise UserError("a turn of the assistant is empty")
        return [template.learned(messages[:j], messages[j], tools) for j in mine]

    written = _each(zip(dialogues, contexts, tools or [None] * len(dialogues)), turns, refuse)
    every = [turn for found in written for turn in found or ()]
    tokens = zip(every, template.tokens.prompts(every), template.tokens.responses(every))
    return [_joined([next(tokens) for _ in found or ()]) for found in written]


def _joined(turns: Sequence[tuple[Written, list[int], Pieces]]) -> list[Encoded]:
    examples: list[Encoded] = []
    for turn, prompt, response in turns:
        done = examples[-1] if examples else None
        if done is None or prompt[: len(done.tokens)] != done.tokens:
            done = Encoded([], [])
            examples.append(done)
        learned = [True] * len(response.tokens)
        if turn.learned is not None:
            learned = [any(a < end and begin < b for a, b in turn.learned) for begin, end in response.spans]
        before = prompt[len(done.tokens) :]
        done.tokens.extend([*before, *response.tokens])
        done.mask.extend([False] * len(before) + learned)
    return examples


def _each(items: Iterable[Any], write: Callable[..., Item], refuse: Refuse | None) -> list[Item | None]:
    """What comes of each item; None where it is refused."""
    found: list[Item | None] = []
    for i, item in enumerate(items):
        try:
            found.append(write(*item))
        except UserError as error:
            if refuse is None:
                raise
            refuse(i, str(error))
            found.append(None)
    return found
