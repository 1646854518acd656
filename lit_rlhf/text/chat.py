"""Chat templates, and dialogues as tokens.

A template turns messages into one string; it is saved with the tokenizer, so that every tool prompts a model as it
was trained. A base model has one too: it only writes the turns below each other."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.text.records import Messages
from lit_rlhf.text.tokenizer import ROLES

# A model that has only seen text has no roles: it goes on where the text stops.
BASE_TEMPLATE = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"

# The space before each text makes its first word the same token as inside a sentence.
ROLE_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|> ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# For checkpoints without role tokens: the transcript form of hh-rlhf, in plain text.
TRANSCRIPT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '\\n\\n' + ('Assistant' if message['role'] == 'assistant' else message['role'].replace('user', 'human')"
    ".capitalize()) + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)


def ensure_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a base model's tokenizer a chat template; one that already has one of its own keeps it."""
    if is_base(tokenizer):
        has_roles = all(role in tokenizer.get_vocab() for role in ROLES)
        tokenizer.chat_template = ROLE_TEMPLATE if has_roles else TRANSCRIPT_TEMPLATE


@dataclass(frozen=True)
class Transcript:
    """A conversation on paper, which a base model goes on with: text alone makes it a weak assistant (GPT-3, 2.1).

    The template opens with ``opening`` (or with the dialogue's system message) and ``examples``; each turn begins with
    the speaker's name. A base model does not end its turn but goes on with the human's, so generation must stop before
    one of :attr:`stops`."""

    opening: str = ""  # the first paragraph; "": there is none
    examples: Sequence[dict[str, Any]] = ()  # messages that stand before the dialogue: one or several turns each
    human: str = "Human:"
    assistant: str = "Assistant:"
    between: str = "\n\n"  # stands between two turns
    end: str = ""  # where an answer is over too; "": at the next turn only

    @property
    def stops(self) -> tuple[str, ...]:
        """Where an answer ends: at the next turn, whoever takes it."""
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
        opening, human, assistant, between, written = (
            json.dumps(text, ensure_ascii=False)  # as a string of the template's language
            for text in (self.opening, self.human, self.assistant, self.between, examples)
        )
        return (
            "{% set system = messages[0]['content'] if messages and messages[0]['role'] == 'system' else "
            f"{opening} %}}{{{{ system + {between} if system else '' }}}}{{{{ {written} }}}}"
            "{% for message in messages if message['role'] != 'system' %}"
            f"{{{{ {assistant} if message['role'] == 'assistant' else {human} }}}}{{{{ ' ' + message['content'] }}}}"
            f"{{% if not loop.last or add_generation_prompt %}}{{{{ {between} }}}}{{% endif %}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ {assistant} }}}}{{% endif %}}"
        )

    def prompting(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """A copy of ``tokenizer`` that writes dialogues like this."""
        prompting = copy.deepcopy(tokenizer)
        prompting.chat_template = self.template
        return prompting


def is_base(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a model has learned no dialogues: its tokenizer has no chat template of its own."""
    return tokenizer.chat_template in (None, BASE_TEMPLATE)


class Encoded(NamedTuple):
    """A dialogue as tokens, with the tokens that the model is to learn."""

    tokens: list[int]
    mask: list[bool]  # True = a token of a response, its end-of-text included


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Messages]) -> list[list[int]]:
    """Tokens of each prompt, up to where the assistant's answer begins."""
    return _tokenize(tokenizer, _render(tokenizer, prompts, generation_prompt=True))


def encode_responses(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Messages], responses: Sequence[str]
) -> list[list[int]]:
    """Tokens of each response as the template writes it after its prompt, with end-of-text as the last one."""
    return _end(tokenizer, _tokenize(tokenizer, [text for _, text in _answers(tokenizer, prompts, responses)]))


def encode_dialogues(
    tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Messages], contexts: Sequence[int]
) -> list[Encoded]:
    """Tokens of whole dialogues; the assistant's turns from message ``contexts[i]`` on are the ones to learn.

    Each turn is tokenized as it will be at generation time: the prompt alone, then the response."""
    turns = [
        (i, j)
        for i, messages in enumerate(dialogues)
        for j, message in enumerate(messages)
        if message["role"] == "assistant" and j >= contexts[i]
    ]
    answers = _answers(tokenizer, [dialogues[i][:j] for i, j in turns], [dialogues[i][j]["content"] for i, j in turns])
    written = [""] * len(dialogues)
    between = []  # what stands before each answer since the one before it
    for (i, _), (prompt, answer) in zip(turns, answers):
        between.append(_after(written[i], prompt))
        written[i] = prompt + answer
    encoded = [Encoded([], []) for _ in dialogues]
    responses = _end(tokenizer, _tokenize(tokenizer, [answer for _, answer in answers]))
    for (i, _), before, response in zip(turns, _tokenize(tokenizer, between), responses):
        encoded[i].tokens.extend(before + response)
        encoded[i].mask.extend([False] * len(before) + [True] * len(response))
    return encoded


def _answers(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Messages], responses: Sequence[str]
) -> list[tuple[str, str]]:
    """(prompt, answer) as the template writes them; the answer up to its end-of-text, which may be missing."""
    before = _render(tokenizer, prompts, generation_prompt=True)
    dialogues = [[*prompt, {"role": "assistant", "content": text}] for prompt, text in zip(prompts, responses)]
    answers = []
    for start, whole in zip(before, _render(tokenizer, dialogues, generation_prompt=False)):
        # What a template writes after end-of-text (a newline, say) belongs to the next turn.
        text, eos, _ = _after(start, whole).partition(tokenizer.eos_token)
        answers.append((start, text + eos))
    return answers


def _after(start: str, whole: str) -> str:
    if not whole.startswith(start):
        raise UserError(
            "this tokenizer's chat template rewrites earlier turns when a turn is added, so prompt and response cannot "
            f"be told apart; set another template. It began {start[-60:]!r} and became {whole[-60:]!r}."
        )
    return whole[len(start) :]


def _end(tokenizer: PreTrainedTokenizerBase, responses: list[list[int]]) -> list[list[int]]:
    eos = tokenizer.eos_token_id
    return [tokens if tokens[-1:] == [eos] else [*tokens, eos] for tokens in responses]


def _render(tokenizer: PreTrainedTokenizerBase, dialogues: Sequence[Messages], generation_prompt: bool) -> list[str]:
    if not dialogues:
        return []
    try:
        return tokenizer.apply_chat_template(
            [list(messages) for messages in dialogues], tokenize=False, add_generation_prompt=generation_prompt
        )
    except TemplateError as error:  # raised by templates that want turns to alternate, or know no system turn
        raise UserError(f"this tokenizer's chat template refuses a dialogue of the data: {error}") from None


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    # Special tokens come from the template, never from the tokenizer's own post-processing.
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
