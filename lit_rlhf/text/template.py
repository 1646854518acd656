"""How a tokenizer's chat template writes a dialogue: where an answer begins, and where it ends."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_rlhf.errors import UserError, say
from lit_rlhf.text.special_tokens import Names, SpecialTokens, any_of, check, check_characters, marked
from lit_rlhf.text.template_tokens import Written, WrittenTokens

Tools = list[dict[str, Any]] | None  # what an assistant may call, as templates want it
Message = dict[str, Any]
Note = Callable[[str], None]  # says a line

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
CLOSING = re.compile(r"</|<\w+\|>")  # what begins with the end of a thought, <channel|> say
CUT_TAG = re.compile(r"[<\[][^<>\[\]\s]*\Z")
REASONING = ("reasoning_content", "thinking", "reasoning")  # fields of a message beside its content


class Template:
    """A tokenizer's chat template, after a look at how it writes a question and an answer.

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
        self.tokens = WrittenTokens(tokenizer, special_tokens)
        self._note, self._noted = note, set[str]()
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
        self._added = any_of(token.content for token in added)
        self._run = re.compile(f"(?:{self._added.pattern})+")
        self._tail = re.compile(rf"(?:{self._added.pattern}|\s)+\Z")
        self._in_parts: frozenset[str] = frozenset()  # the roles whose content it wants as a list of parts
        self._calls_as_text = False  # it wants the arguments of a call as JSON, not as an object
        self._opening = ""  # of an assistant's turn that it writes at the end of whatever it is given
        self._after: str | None = None  # what it writes after an answer
        self._names = Names(tokenizer, ())
        if special_tokens != "rendered":
            self._after = self._probe()
            if self.end is not None:
                _check_end(tokenizer, self.end, self._after)
            special = {token.content for token in added if token.special}
            self._names = Names(tokenizer, special | _marking_turns(self))

    @property
    def end(self) -> str | None:
        """The token with which it ends the assistant's turn; None where it writes none."""
        ends = self._added.findall(self._up_to_end(self._after or "") or "")
        return ends[-1] if ends else None

    # ------------------------------------------------------------------ writing

    def prompt(self, messages: Sequence[Message], tools: Tools = None) -> Written:
        """The dialogue up to where the assistant answers."""
        (shielded, tools), mark = self._shielded([*messages], tools)
        return Written(self._prompt(shielded, tools), mark=mark)

    def dialogue(self, messages: Sequence[Message], tools: Tools = None) -> Written:
        """All of the dialogue, with what the template writes behind it."""
        (shielded, tools), mark = self._shielded([*messages], tools)
        return Written(self._write(shielded, tools), mark=mark)

    def turn(self, messages: Sequence[Message], answer: Message, tools: Tools = None) -> Written:
        """The dialogue up to where the assistant answers, and the answer up to the end of its turn."""
        return self._turn(messages, answer, tools)[0]

    def learned(self, messages: Sequence[Message], answer: Message, tools: Tools = None) -> Written:
        """The same, with what is learned where the template marks it itself, {% generation %} to {% endgeneration %}.

        What it marks may go beyond the end of the turn: then so does the response."""
        written, whole, tools, start = self._turn(messages, answer, tools)
        if start is None or not re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", self._source(tools)):
            return written
        marked = self._generated(whole, tools, start)
        response, text = written.response, self._write(whole, tools)
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
        _check_said(answer, reply, lambda: prompt[_in_common(prompt, self._write(before, tools)) :])
        return Written(prompt, self._ended(reply), mark=mark), shielded, tools, start

    def _at_one_time(self, before: list[Message], messages: list[Message], tools: Tools) -> tuple[str, str]:
        """A prompt, and the dialogue that goes on from it: some templates write the time."""
        for _ in range(3):
            prompt, whole = self._prompt(before, tools), self._write(messages, tools)
            if whole.startswith(prompt) or self._prompt(before, tools) == prompt:
                return prompt, whole
        raise UserError("this tokenizer's chat template writes the same dialogue otherwise each time; set another")

    def _shielded(self, messages: list[Message], tools: Tools) -> tuple[Any, str]:
        check_characters((messages, tools))
        if self.special_tokens == "refuse":
            check(self._names, messages)
        return marked(self.tokenizer, self._names, ([self._as_wanted(m) for m in messages], tools))

    def _prompt(self, messages: list[Message], tools: Tools) -> str:
        if not any(message["role"] in ("user", "tool") for message in messages):
            raise UserError(f"{'only a system message' if messages else 'nothing'} stands before the assistant's turn")
        for message in messages:
            if message["role"] == "user" and not content_of(message).strip():
                raise UserError("a turn of the user is empty")
        prompt = self._write(messages, tools, generation_prompt=True)
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

    def _write(self, messages: list[Message], tools: Tools = None, generation_prompt: bool = False) -> str:
        if self.special_tokens == "rendered":
            return _as_it_stands(messages)
        try:
            written = str(self._render(messages, tools, tokenize=False, add_generation_prompt=generation_prompt))
        except Exception as error:  # a template is a program, and may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"this tokenizer's chat template refuses the dialogue: {reason}") from None
        return written if generation_prompt else written.removesuffix(self._opening)

    def _render(self, messages: list[Message], tools: Any, **settings: Any) -> Any:
        return self.tokenizer.apply_chat_template(messages, tools=tools, **settings)

    def _as_wanted(self, message: Message) -> Message:
        """Content as a text, or as a list of parts; arguments of calls as an object, or as JSON."""
        if self._calls_as_text and message.get("tool_calls"):
            message = {**message, "tool_calls": [_with_json(call) for call in message["tool_calls"]]}
        content, in_parts = message.get("content"), message["role"] in self._in_parts
        if isinstance(content, str) and in_parts:
            return {**message, "content": [{"type": "text", "text": content}]}
        if isinstance(content, list) and not in_parts:
            if other := [part for part in content if not isinstance(part, str) and "text" not in part]:
                raise UserError(f"a message holds a part that is no text ({str(other[0])[:60]})")
            return {**message, "content": content_of(message)}
        return message

    # ------------------------------------------------------------------ reading what was written

    def _reply(
        self, prompt: str, whole: str, before: list[Message], answer: Message, tools: Tools
    ) -> tuple[str, int | None]:
        """What ``whole`` writes behind the prompt, and where that begins in it.

        Some templates end a prompt in another way than a dialogue with its answer goes on, with an opened <think> say:
        then the answer is what comes after the part that they have in common, without what the prompt has opened. Where
        the template leaves out a part of the answer there, or writes the prompt itself anew, the answer stands as it is
        given (and nowhere in it)."""
        start = _shared(prompt, whole)
        if not prompt[start:].strip():
            return whole[start:], start
        asked = _in_common(prompt, self._write(before, tools))
        opened, goes_on = prompt[max(start, asked) :].strip(), start >= asked
        if goes_on and CLOSING.match(opened):
            raise UserError(
                f"this tokenizer's chat template ends a prompt with {prompt[asked:].strip()!r}, behind which it cannot "
                "write what an answer thinks; take that out of the data, or set another template"
            )
        blank = self._write([*before, self._as_wanted({**answer, "content": ANSWER})], tools)
        start = _shared(prompt, blank)
        said = content_of(answer)
        written = asked <= start and whole.startswith(blank[:start]) and _squeezed(said) in _squeezed(whole[start:])
        reply = whole[start:] if written else said + (self._after or "")
        if opened and reply.lstrip().startswith(opened):
            reply = reply.lstrip().removeprefix(opened).lstrip("\n")
        elif goes_on and opened.replace("<", "</") not in reply:
            self._say(
                f"this tokenizer's chat template ends a prompt with {opened!r}, and writes none before an answer: an "
                "answer that does not begin with it is learned behind it as it stands"
            )
        return reply, len(whole) - len(reply) if written else None

    def _ended(self, reply: str) -> str:
        """The reply up to the end of the turn; where the template writes none, the tokenizer's own is put behind it."""
        tail = self._tail.search(reply)
        after = tail[0] if tail else ""
        if self._after is not None and reply.endswith(self._after):
            after = self._after
        said, end = reply[: len(reply) - len(after)], self._up_to_end(after)
        return said + (after.rstrip() + str(self.tokenizer.eos_token) if end is None else end)

    def _up_to_end(self, after: str) -> str | None:
        """Of what stands behind an answer, the part that ends with the first special tokens."""
        run = self._run.search(after)
        if run is None:
            return None
        ends = self._added.findall(run[0])
        if self.tokenizer.eos_token in ends:
            ends = ends[: ends.index(self.tokenizer.eos_token) + 1]
        return after[: run.start()] + "".join(ends)

    def _generated(self, messages: list[Message], tools: Tools, start: int) -> list[tuple[int, int]]:
        """Characters, counted from ``start``, that the template marks as the assistant's."""
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

    # ------------------------------------------------------------------ a first look

    def _probe(self) -> str:
        """What the template writes after an answer, in the form of content that it shows, which may be the role's."""
        refused = []
        for self._in_parts in FORMS:
            asked, answer = (
                self._as_wanted({"role": role, "content": text})
                for role, text in (("user", QUESTION), ("assistant", ANSWER))
            )
            try:
                prompt, whole = self._write([asked], generation_prompt=True), self._write([asked, answer])
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
            if CALL["name"] in self._write_if_it_can([asked, self._as_wanted(CALLING)]):
                break
        call = self._as_wanted(CALLING)
        for roles, before, behind in ((["system", "developer"], [], [asked]), (["tool"], [asked, call], [])):
            usual = self._in_parts
            for self._in_parts in (usual, usual ^ {*roles}, usual):
                said = self._as_wanted({"role": roles[0], "content": OTHER})
                written = self._write_if_it_can([*before, said, *behind])
                if OTHER in written and not AS_PARTS.search(written):
                    break

    def _opened_unasked(self, asked: Message, answer: Message) -> str:
        """The opening of an assistant's turn that a template without a look at ``add_generation_prompt`` writes behind
        every dialogue; "" where it writes none.

        Behind an answer stand the end of the turn and that opening, or, where a question follows, the same end and the
        user's opening. What both openings begin with, ``<|im_start|>`` say, begins the first turn, too."""
        asking, closed = self._write([asked]), _behind(self._write([asked, answer]), ANSWER)
        between = _behind(self._write_if_it_can([asked, answer, asked]), ANSWER)
        if asking != self._write([asked], generation_prompt=True) or between.startswith(closed):
            return ""
        begun = self._write_if_it_can([self._as_wanted({"role": "system", "content": OTHER}), asked])
        begins = [text.partition(mark)[0] for text, mark in ((begun, OTHER), (asking, QUESTION)) if mark in text]
        turns = [self._pieces(text.removeprefix(self.tokenizer.bos_token or "")) for text in begins]
        ending, following = self._pieces(closed), self._pieces(between)
        same = following[: _in_common(following, ending)]
        end = len(same) - len(_begins_a_turn(same, turns))
        alike = _in_common(ending[::-1], self._pieces(_behind(asking, QUESTION))[::-1])
        opening = "".join(ending[max(end, len(ending) - alike) :])
        return opening if opening.strip() else ""

    def _write_if_it_can(self, messages: list[Message], tools: Tools = None) -> str:
        try:
            return self._write(messages, tools)
        except UserError:
            return ""

    def _pieces(self, text: str) -> list[str]:
        """Added tokens, and single characters of what stands between them."""
        return re.findall(rf"{self._added.pattern}|.", text, re.DOTALL)

    def _source(self, tools: Tools) -> str:
        return self.tokenizer.get_chat_template(None, tools) if self.special_tokens != "rendered" else ""


def _check_end(tokenizer: PreTrainedTokenizerBase, end: str, after: str) -> None:
    """Refuse a tokenizer to which the ``end`` of a turn is no token behind a word, as with ``single_word``."""
    if tokenizer.convert_tokens_to_ids(end) not in tokenizer("a" + after, add_special_tokens=False)["input_ids"]:
        raise UserError(
            f"this tokenizer reads {end!r} behind a word as characters, so no answer would ever end; in "
            "tokenizer.json, set 'single_word' and 'normalized' of this added token to false"
        )


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


def _marking_turns(template: Template) -> set[str]:
    """Added tokens that open or close a turn of any role, or stand around tools and what they say, though they are not
    flagged as special.

    Others, <think> and <tool_call> say, are left to those who write them: in an assistant's turn they mean what they
    say."""
    wanted, write, tokens = template._as_wanted, template._write_if_it_can, template._added.findall
    asked, said = wanted({"role": "user", "content": QUESTION}), {"role": "assistant", "content": OTHER}
    system, developer, tool = (wanted({**said, "role": role}) for role in ("system", "developer", "tool"))
    user, prompt = write([asked]), template._write([asked], generation_prompt=True)
    alone = [user, write([system, asked]), write([developer, asked]), write([asked, tool])]
    answered = prompt[: _shared(prompt, write([asked, wanted(said)]))]
    opening = template._run.search(answered, _in_common(user, prompt))
    closing = template._up_to_end(template._after or "")
    marks = tokens("".join([*alone, opening[0] if opening else "", closing or ""]))
    calling, thinking = [asked, wanted(CALLING)], [asked, wanted({**said, **dict.fromkeys(REASONING, OTHER)})]
    around = write([*calling, tool]) + write([asked], [{"type": "function", "function": TOOL}])
    own = "".join(text[_in_common(user, text) :] for text in map(write, (calling, thinking)))
    return {*marks} | {*tokens(around)} - {*tokens(own)}


def _as_it_stands(messages: list[Message]) -> str:
    asked = [message for message in messages if message["role"] != "assistant"]
    if [message["role"] for message in asked] != ["user"] or messages[0]["role"] != "user" or len(messages) > 2:
        raise UserError(
            f"special_tokens=rendered is for a prompt that is one text; this one has {len(messages)} messages"
        )
    return "".join(map(content_of, messages))


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


def _in_common(one: Sequence[str], two: Sequence[str]) -> int:
    """How many characters (or pieces) two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, two)) if a != b), min(len(one), len(two)))


def _shared(one: str, two: str) -> int:
    """How many characters two texts begin with alike, up to the last whole tag: of <think> and </think>, none."""
    alike = one[: _in_common(one, two)]
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


def _says(written: str, text: str) -> bool:
    """Whether a text, or the same as a JSON string, is in what was written; spaces do not count."""
    return any(_squeezed(form) in _squeezed(written) for form in (text, json.dumps(text, ensure_ascii=False)[1:-1]))


def _squeezed(text: str) -> str:
    """Without spaces and line breaks, of which templates take some away."""
    return "".join(text.split())
