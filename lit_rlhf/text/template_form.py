"""In which form a tokenizer's chat template takes messages, and what it writes around a question and an answer."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.text.special_tokens import Names, any_of

Tools = list[dict[str, Any]] | None  # what an assistant may call, as templates want it
Message = dict[str, Any]

OTHER, QUESTION, ANSWER = "(other)", "(question)", "(answer)"  # written to see what a template does with it
AS_PARTS = re.compile(r"""['"]text['"]: ?['"]\(\w+\)""")  # of these a list of parts, where a text was wanted
CALL: dict[str, Any] = {"name": "some_function", "arguments": {}}
CALLING: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": "123456789", "function": CALL}],
}
TOOL = {"name": CALL["name"], "description": "", "parameters": {"type": "object", "properties": {}}}
OTHERS = frozenset({"system", "developer", "user", "tool"})  # roles besides the assistant's
FORMS = (frozenset[str](), OTHERS | {"assistant"}, OTHERS, frozenset({"assistant"}))  # roles with content in parts
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
CUT_TAG = re.compile(r"[<\[][^<>\[\]\s]*\Z")
REASONING = ("reasoning_content", "thinking", "reasoning")  # fields of a message beside its content


class RenderedForm:
    """Prompts and answers that a template has written already, each one text: they are taken as they stand.

    Attributes:
        after: what is written after an answer; None: nothing is known of it.
        end: the token that ends the assistant's turn; None where none is written.
    """

    after: str | None = None

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._tokens = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
        self._added = any_of(token.content for token in self._tokens)
        self._run = re.compile(f"(?:{self._added.pattern})+")
        self._tail = re.compile(rf"(?:{self._added.pattern}|\s)+\Z")
        self.in_parts: frozenset[str] = frozenset()  # the roles whose content is wanted as a list of parts
        self._calls_as_text = False  # the arguments of a call are wanted as JSON, not as an object
        self.developer_as_system = False  # it knows no developer, and does know a system message

    @property
    def end(self) -> str | None:
        ends = self._added.findall(self.up_to_end(self.after or "") or "")
        return ends[-1] if ends else None

    @property
    def names(self) -> Names:
        """What would be read as control in people's text."""
        return Names(self.tokenizer, ())

    def write(self, messages: list[Message], tools: Tools = None, generation_prompt: bool = False) -> str:
        """The dialogue; with ``generation_prompt`` up to where the assistant answers."""
        asked = [message for message in messages if message["role"] != "assistant"]
        if [message["role"] for message in asked] != ["user"] or messages[0]["role"] != "user" or len(messages) > 2:
            raise UserError(
                f"special_tokens=rendered is for a prompt that is one text; this one has {len(messages)} messages"
            )
        return "".join(map(content_of, messages))

    def generated(self, messages: list[Message], tools: Tools, start: int) -> list[tuple[int, int]] | None:
        """Characters, counted from ``start``, that it marks itself as the assistant's, {% generation %} to
        {% endgeneration %}; None where it has no such marks."""
        return None

    def as_expected(self, message: Message) -> Message:
        """Content as a text, or as a list of parts; arguments of calls as an object, or as JSON; a role it knows."""
        if self.developer_as_system and message["role"] == "developer":
            message = {**message, "role": "system"}
        if self._calls_as_text and message.get("tool_calls"):
            message = {**message, "tool_calls": [_with_json(call) for call in message["tool_calls"]]}
        content, in_parts = message.get("content"), message["role"] in self.in_parts
        if isinstance(content, str) and in_parts:
            return {**message, "content": [{"type": "text", "text": content}]}
        if isinstance(content, list) and not in_parts:
            if other := [part for part in content if not isinstance(part, str) and "text" not in part]:
                raise UserError(f"a message holds a part that is no text ({str(other[0])[:60]})")
            return {**message, "content": content_of(message)}
        return message

    def ended(self, reply: str) -> str:
        """The reply up to the end of the turn; where the template writes none, the tokenizer's own is put behind it."""
        tail = self._tail.search(reply)
        after = tail[0] if tail else ""
        if self.after is not None and reply.endswith(self.after):
            after = self.after
        said, end = reply[: len(reply) - len(after)], self.up_to_end(after)
        return said + (after.rstrip() + str(self.tokenizer.eos_token) if end is None else end)

    def up_to_end(self, after: str) -> str | None:
        """Of what stands behind an answer, the part that ends with the first special tokens."""
        run = self._run.search(after)
        if run is None:
            return None
        ends = self._added.findall(run[0])
        if self.tokenizer.eos_token in ends:
            ends = ends[: ends.index(self.tokenizer.eos_token) + 1]
        return after[: run.start()] + "".join(ends)


class TemplateForm(RenderedForm):
    """A tokenizer's chat template, after a look at how it writes a question and an answer.

    Raises ``UserError`` where it cannot write these."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        self._opening = ""  # of an assistant's turn that it writes at the end of whatever it is given
        self.after = self._probe()
        if self.end is not None:
            _check_end(tokenizer, self.end, self.after)

    @property
    def names(self) -> Names:
        return Names(self.tokenizer, {t.content for t in self._tokens if t.special} | self._marking_turns())

    def write(self, messages: list[Message], tools: Tools = None, generation_prompt: bool = False) -> str:
        try:
            written = str(self._render(messages, tools, tokenize=False, add_generation_prompt=generation_prompt))
        except Exception as error:  # a template is a program, and may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"this tokenizer's chat template refuses the dialogue: {reason}") from None
        return written if generation_prompt else written.removesuffix(self._opening)

    def _render(self, messages: list[Message], tools: Any, **settings: Any) -> Any:
        return self.tokenizer.apply_chat_template(messages, tools=tools, **settings)

    def generated(self, messages: list[Message], tools: Tools, start: int) -> list[tuple[int, int]] | None:
        if not GENERATION.search(self.tokenizer.get_chat_template(None, tools)):
            return None
        found = self._render(
            messages, tools, return_dict=True, return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )  # fmt: skip
        spans: list[tuple[int, int]] = []
        for (begin, end), mine in zip(found["offset_mapping"], found["assistant_masks"]):
            if mine and end > start:
                begin, end = max(begin, start) - start, end - start
                if spans and spans[-1][1] >= begin:
                    begin = spans.pop()[0]
                spans.append((begin, end))
        if not spans:
            raise UserError("this tokenizer's chat template marks nothing of an answer as the assistant's")
        return spans

    def _probe(self) -> str:
        """What the template writes after an answer, in the form of content that it shows, which may be the role's."""
        refused = []
        for self.in_parts in FORMS:
            asked, answer = (
                self.as_expected({"role": role, "content": text})
                for role, text in (("user", QUESTION), ("assistant", ANSWER))
            )
            try:
                prompt, whole = self.write([asked], generation_prompt=True), self.write([asked, answer])
            except UserError as error:
                refused.append(str(error))
                continue
            if QUESTION in prompt and ANSWER in whole and not AS_PARTS.search(whole):
                self._choose_forms(asked)
                self._opening = self._opened_unasked(asked, answer)
                return _behind(whole, ANSWER).removesuffix(self._opening)
        dropped = "it leaves out what is said, whether as a text or as a list of parts"
        reason = refused[0] if len(refused) == len(FORMS) else dropped
        raise UserError(f"this tokenizer's chat template cannot write a question and an answer: {reason}")

    def _choose_forms(self, asked: Message) -> None:
        """Other roles are written as the user, or, where the template shows them in the other form alone, in that."""
        for self._calls_as_text in (False, True, False):
            if CALL["name"] in self._write_if_it_can([asked, self.as_expected(CALLING)]):
                break
        call = self.as_expected(CALLING)
        for roles, before, behind in ((["system", "developer"], [], [asked]), (["tool"], [asked, call], [])):
            usual = self.in_parts
            for self.in_parts in (usual, usual ^ {*roles}, usual):
                said = self.as_expected({"role": roles[0], "content": OTHER})
                written = self._write_if_it_can([*before, said, *behind])
                if OTHER in written and not AS_PARTS.search(written):
                    break
        system, developer = (self.as_expected({"role": role, "content": OTHER}) for role in ("system", "developer"))
        known = (OTHER in self._write_if_it_can([message, asked]) for message in (system, developer))
        self.developer_as_system = [*known] == [True, False]

    def _opened_unasked(self, asked: Message, answer: Message) -> str:
        """The opening of an assistant's turn that a template without a look at ``add_generation_prompt`` writes behind
        every dialogue; "" where it writes none.

        Behind an answer stand the end of the turn and that opening, or, where a question follows, the same end and the
        user's opening. What both openings begin with, ``<|im_start|>`` say, begins the first turn, too."""
        asking, closed = self.write([asked]), _behind(self.write([asked, answer]), ANSWER)
        between = _behind(self._write_if_it_can([asked, answer, asked]), ANSWER)
        if asking != self.write([asked], generation_prompt=True) or between.startswith(closed):
            return ""
        begun = self._write_if_it_can([self.as_expected({"role": "system", "content": OTHER}), asked])
        begins = [text.partition(mark)[0] for text, mark in ((begun, OTHER), (asking, QUESTION)) if mark in text]
        turns = [self._pieces(text.removeprefix(self.tokenizer.bos_token or "")) for text in begins]
        ending, following = self._pieces(closed), self._pieces(between)
        same = following[: in_common(following, ending)]
        end = len(same) - len(_begins_a_turn(same, turns))
        alike = in_common(ending[::-1], self._pieces(_behind(asking, QUESTION))[::-1])
        opening = "".join(ending[max(end, len(ending) - alike) :])
        return opening if opening.strip() else ""

    def _marking_turns(self) -> set[str]:
        """Added tokens that open or close a turn of any role, or stand around tools and what they say, though they are
        not flagged as special.

        Others, <think> and <tool_call> say, are left to those who write them: in an assistant's turn they mean what
        they say."""
        formed, write, tokens = self.as_expected, self._write_if_it_can, self._added.findall
        asked, said = formed({"role": "user", "content": QUESTION}), {"role": "assistant", "content": OTHER}
        system, developer, tool = (formed({**said, "role": role}) for role in ("system", "developer", "tool"))
        user, prompt = write([asked]), self.write([asked], generation_prompt=True)
        alone = [user, write([system, asked]), write([developer, asked]), write([asked, tool])]
        answered = prompt[: shared(prompt, write([asked, formed(said)]))]
        opening = self._run.search(answered, in_common(user, prompt))
        closing = self.up_to_end(self.after or "")
        marks = tokens("".join([*alone, opening[0] if opening else "", closing or ""]))
        calling, thinking = [asked, formed(CALLING)], [asked, formed({**said, **dict.fromkeys(REASONING, OTHER)})]
        around = write([*calling, tool]) + write([asked], [{"type": "function", "function": TOOL}])
        own = "".join(text[in_common(user, text) :] for text in map(write, (calling, thinking)))
        return {*marks} | {*tokens(around)} - {*tokens(own)}

    def _write_if_it_can(self, messages: list[Message], tools: Tools = None) -> str:
        try:
            return self.write(messages, tools)
        except UserError:
            return ""

    def _pieces(self, text: str) -> list[str]:
        """Added tokens, and single characters of what stands between them."""
        return re.findall(rf"{self._added.pattern}|.", text, re.DOTALL)


def _check_end(tokenizer: PreTrainedTokenizerBase, end: str, after: str) -> None:
    """Refuse a tokenizer to which the ``end`` of a turn is no token behind a word, as with ``single_word``."""
    if tokenizer.convert_tokens_to_ids(end) not in tokenizer("a" + after, add_special_tokens=False)["input_ids"]:
        raise UserError(
            f"this tokenizer reads {end!r} behind a word as characters, so no answer would ever end; in "
            "tokenizer.json, set 'single_word' and 'normalized' of this added token to false"
        )


def content_of(message: Message) -> str:
    """The text of a message: its content, or the texts of its parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)


def _with_json(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    written = {**function, "arguments": json.dumps(function.get("arguments"), ensure_ascii=False)}
    return {**call, "function": written} if "function" in call else written


def in_common(one: Sequence[str], two: Sequence[str]) -> int:
    """How many characters (or pieces) two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, two)) if a != b), min(len(one), len(two)))


def shared(one: str, two: str) -> int:
    """How many characters two texts begin with alike, up to the last whole tag: of <think> and </think>, none."""
    alike = one[: in_common(one, two)]
    return len(alike if alike in (one, two) else CUT_TAG.sub("", alike))


def _behind(text: str, part: str) -> str:
    """What stands behind the last ``part`` of a text."""
    return text.rpartition(part)[2]


def _begins_a_turn(pieces: list[str], begins: list[list[str]]) -> list[str]:
    """The last of ``pieces``, as many as one of ``begins`` begins with, or else holds."""
    tails = [pieces[i:] for i in range(len(pieces))]
    first = (t for t in tails if any(begin[: len(t)] == t for begin in begins))
    within = (t for t in tails if any(t == begin[i : i + len(t)] for begin in begins for i in range(len(begin))))
    return next(first, None) or next(within, [])
