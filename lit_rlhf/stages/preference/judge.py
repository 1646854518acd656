"""A language model as the judge, behind an OpenAI-compatible URL (vLLM, llama.cpp, Ollama, OpenAI ...)."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import httpx
from pydantic import AfterValidator, Field

from lit_rlhf.errors import CREDENTIALS, UserError, scrubbed
from lit_rlhf.stages.callables import Ranks
from lit_rlhf.stages.preference.annotators import place, run_async
from lit_rlhf.stages.preference.progress_file import ProgressFile
from lit_rlhf.text.records import Messages, ranks_of, text_of
from lit_rlhf.text.special_tokens import SpecialTokens, check
from lit_rlhf.text.template import Tools

Verdict = Literal["A", "B", "tie", "?"]  # ?: the reply said none of them, however often it was asked

INSTRUCTION = """\
You compare two answers of an assistant to the same dialogue. The better one is more helpful, truthful and harmless; \
length, order and tone alone do not make it better. Reply with one word: A, B, or tie."""

TOOLS = "functions that the assistant may call: "

# What templates of many families have as control tokens: which of them the model behind a URL has, nobody says.
CONTROL = re.compile(
    r"<[|\uff5c][^<>\s]{1,60}[|\uff5c]>|</?s>|<(?:bos|eos|pad|unk)>|<(?:start|end)_of_\w+>|<</?SYS>>|"
    r"\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|gMASK|BOS|EOS)\]"
)

API_KEY = "OPENAI_API_KEY"

ASKED = Path(__file__).with_name("judge_question.txt").read_text(encoding="utf-8").rstrip("\n")


def variable(name: str) -> str:
    """The name of an environment variable that may hold a key; ``UserError`` where it looks like the key itself."""
    if name != API_KEY and (name not in os.environ or not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name)):
        raise UserError(f"the name of an environment variable that is set was expected, in capitals as {API_KEY} is")
    return name


class Question(NamedTuple):
    """Which of two answers is better; asked once in each order."""

    prompt: Messages
    first: str
    second: str
    tools: Tools = None  # what the assistant may call


class LLMJudge:
    """Ranks answers by asking a language model about every two of them, in both orders.

    Where the two orders disagree the pair is a tie (the judge went by the place). An answer's rank follows from the
    pairs that it wins, a tie counting half. Verdicts are on disk as they come: where the server is down for good the
    call ends in a ``UserError``, and the next one asks only what is still open.

    Args:
        url: of the API, up to and with its version: the requests go to ``<url>/chat/completions``.
        model: its name there.
        instruction: the system message; None: helpful, truthful, harmless.
        api_key_env: name of the environment variable that holds the key, or a whole ``Authorization`` header
            (``Basic ...``); where ``OPENAI_API_KEY`` is not set, none is sent. It goes to this URL alone: no redirect
            is followed.
        concurrency: requests at the same time.
        timeout: seconds per request.
        retries: times that a request which failed, or a reply that is no verdict, is asked again.
        backoff: seconds before the first retry, twice as many before each further one, at most 60.
        max_tokens: of a reply.
        special_tokens: names of control tokens, ``<|im_end|>`` say, in dialogues and answers: "plain" puts a space into
            them, so that the server reads them as text; "refuse" is an error; "rendered" sends them as they are.
        progress_file: of the verdicts so far; None keeps them in memory.
    """

    takes_tools = True

    def __init__(
        self,
        url: str,
        model: str,
        *,
        instruction: str | None = None,
        api_key_env: Annotated[str, AfterValidator(variable)] = API_KEY,
        concurrency: Annotated[int, Field(ge=1)] = 8,
        timeout: Annotated[float, Field(gt=0)] = 60.0,
        retries: Annotated[int, Field(ge=0)] = 5,
        backoff: Annotated[float, Field(ge=0)] = 1.0,
        max_tokens: Annotated[int, Field(ge=1)] = 16,
        special_tokens: SpecialTokens = "plain",
        progress_file: str | Path | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")) or CREDENTIALS.search(url):
            raise UserError(
                "annotator.url: http://... or https://... was expected, without a password or key, which "
                "annotator.api_key_env names"
            )
        self.url, self.model, self.instruction = url.rstrip("/"), model, instruction or INSTRUCTION
        self.api_key_env, self.concurrency, self.timeout = variable(api_key_env), concurrency, timeout
        self.retries, self.backoff, self.max_tokens = retries, backoff, max_tokens
        self.name, self.special_tokens = f"llm_judge:{model}", special_tokens
        self.progress = ProgressFile(progress_file)
        known = self.progress.results.items()
        self.verdicts: dict[str, Verdict] = {key: said for key, said in known if said != "?"}  # nonsense is asked again
        self._compared: dict[str, bool] = {}  # pairs, and whether both orders preferred the same place

    def __call__(
        self,
        prompts: Sequence[Messages],
        responses: Sequence[Sequence[str]],
        tools: Sequence[Tools] | None = None,
    ) -> Ranks:
        asked = [*zip(prompts, responses, tools or [None] * len(prompts))]
        questions = [
            Question(prompt, *order, of_prompt)
            for prompt, answers, of_prompt in asked
            for pair in combinations(dict.fromkeys(answers), 2)  # equal answers are not compared
            for order in (pair, pair[::-1])
        ]
        run_async(self._ask_all(questions))
        self._check_sense(questions)
        return [self._ranks(*each) for each in asked]

    def figures(self) -> dict[str, float]:
        """Figures of the judging: verdicts asked for, how many were none, and the share of pairs in which both orders
        preferred the same place."""
        said, by_place = list(self.verdicts.values()), list(self._compared.values())
        figures = {"judge_verdicts": len(said), "judge_nonsense": said.count("?")}
        return figures | ({"judge_by_place": sum(by_place) / len(by_place)} if by_place else {})

    @staticmethod
    def questions(answers: int) -> int:
        """The most that it is asked about so many answers to a prompt."""
        return answers * (answers - 1)

    def better(self, prompt: Messages, first: str, second: str, tools: Tools = None) -> float:
        """1 where the first answer wins, 0 where the second does, 0.5 for a tie or where the order decided."""
        key = self._key(Question(prompt, first, second, tools))
        verdict = self.verdicts[key]
        swapped = self.verdicts[self._key(Question(prompt, second, first, tools))]
        self._compared[key] = verdict == swapped and verdict in ("A", "B")
        if (verdict, swapped) == ("A", "B"):
            return 1.0
        return 0.0 if (verdict, swapped) == ("B", "A") else 0.5

    def _ranks(self, prompt: Messages, answers: Sequence[str], tools: Tools = None) -> list[int]:
        wins = dict.fromkeys(answers, 0.0)
        for first, second in combinations(wins, 2):
            won = self.better(prompt, first, second, tools)
            wins[first] += won
            wins[second] += 1 - won
        return ranks_of([wins[text] for text in answers])

    async def _ask_all(self, questions: Sequence[Question]) -> None:
        still_open = {self._key(q): q for q in questions if self._key(q) not in self.verdicts}
        turns = asyncio.Semaphore(self.concurrency)
        failed: list[Exception] = []

        async def ask(key: str, question: Question, client: httpx.AsyncClient) -> None:
            async with turns:
                if failed:  # nothing new is asked; what is on its way is waited for and kept
                    return
                try:
                    self.verdicts[key], reply = await self._verdict(question, client)
                    self.progress.add(key, self.verdicts[key], self._scrubbed(reply)[-200:])
                except UserError as error:
                    failed.append(error)

        headers = {"Authorization": key if " " in key else f"Bearer {key}"} if (key := self._api_key) else {}
        limits = httpx.Limits(max_connections=self.concurrency)
        async with httpx.AsyncClient(timeout=self.timeout, headers=headers, limits=limits) as client:
            await asyncio.gather(*(ask(key, question, client) for key, question in still_open.items()))
        if failed:
            raise failed[0]

    @property
    def _api_key(self) -> str:
        key = os.environ.get(self.api_key_env, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{self.api_key_env}: the key holds characters that no header can; set it again")
        return key

    def _scrubbed(self, text: str) -> str:
        """What a server said, without the key, which some servers repeat."""
        return scrubbed(text, self._api_key, self._api_key.rpartition(" ")[2])

    async def _verdict(self, question: Question, client: httpx.AsyncClient) -> tuple[Verdict, str]:
        """The verdict and the reply in which it stands; "?" where no reply had one."""
        reply = ""
        for attempt in range(self.retries + 1):
            try:
                # A cold model that gave no verdict would give the same reply again.
                reply = await self._request(client, question, temperature=0.0 if not reply else 0.7)
            except _Passing as error:
                if attempt == self.retries:
                    raise self._down(error, question) from None
                await asyncio.sleep(error.wait or self._pause(attempt))
                continue
            if (verdict := verdict_of(reply)) is not None:
                return verdict, reply
        return "?", reply

    def _pause(self, attempt: int) -> float:
        """Seconds; not the same for all, so that they do not come back together."""
        return min(60.0, self.backoff * 2**attempt) * random.uniform(0.5, 1.0)

    async def _request(self, client: httpx.AsyncClient, question: Question, temperature: float) -> str:
        """The model's reply. Raises ``_Passing`` for what may be over soon, ``UserError`` for what will not."""
        body = {"model": self.model, "messages": self._messages(question)}
        body |= {"temperature": temperature, "max_tokens": self.max_tokens}
        try:
            response = await client.post(f"{self.url}/chat/completions", json=body)
        except httpx.HTTPError as error:  # no connection, time out, half a reply
            raise _Passing(self._scrubbed(f"{type(error).__name__}: {error}")) from None
        if not response.is_success:
            raise self._refused(response, question)
        try:
            return str(response.json()["choices"][0]["message"]["content"] or "")
        except (ValueError, LookupError, TypeError) as error:  # no JSON, other JSON
            raise _Passing(f"{type(error).__name__}: {error}") from None

    def _refused(self, response: httpx.Response, question: Question) -> Exception:
        said, code = self._scrubbed(response.text)[:300], response.status_code
        if code in (408, 409, 425, 429) or code >= 500:
            wait = response.headers.get("Retry-After", "")
            return _Passing(f"HTTP {code} {said}", min(float(wait), 60.0) if wait.isdecimal() else None)
        hints = {
            401: f"set the key: export {self.api_key_env}=...",
            403: f"set the key: export {self.api_key_env}=...",
            404: "the URL ends with the API's version, http://127.0.0.1:8000/v1 say, and model= is a name it knows",
        }
        if response.has_redirect_location:
            hints[code] = f"it points to {self._scrubbed(response.headers['Location'])}, where nothing was sent"
        hint = hints.get(code, "the prompt may be longer than the judge's context")
        return UserError(
            f"annotator: {self.url} refused the question (HTTP {code}: {' '.join(said.split())}) on "
            f"{place(question.prompt)}; {hint}"
        )

    def _down(self, error: Exception, question: Question) -> UserError:
        kept = f"{len(self.verdicts)} verdicts are kept" + (f" in {self.progress.path}" if self.progress.path else "")
        return UserError(
            f"annotator: {self.url} did not answer ({' '.join(str(error).split())}) in {self.retries + 1} "
            f"attempts, the last on {place(question.prompt)}. {kept}; run the same command when the server is there "
            "again, and it goes on"
        )

    def _check_sense(self, questions: Sequence[Question]) -> None:
        """A reply here and there may be no verdict, and counts as a tie; a judge that never gives one is none."""
        without = [q for q in questions if self.verdicts[self._key(q)] == "?"]
        if len(without) > len(questions) / 2:
            raise UserError(
                f"annotator: {self.model} gave no verdict on {len(without)} of {len(questions)} questions, "
                f"the first on {place(without[0].prompt)}; A, B or tie was expected. Its replies are in "
                f"{self.progress.path or 'its progress_file'}; take another model, another "
                "annotator.instruction, or more max_tokens for one that thinks aloud"
            )

    def _messages(self, question: Question) -> Messages:
        dialogue = "\n\n".join(f"{m['role']}: {text_of(m)}" for m in question.prompt)
        if question.tools:
            dialogue = f"{TOOLS}{json.dumps(question.tools, ensure_ascii=False)}\n\n{dialogue}"
        parts = (self._harmless(text) for text in (dialogue, question.first, question.second))
        asked = ASKED.format(**dict(zip(("dialogue", "first", "second"), parts)))
        return [{"role": "system", "content": self.instruction}, {"role": "user", "content": asked}]

    def _harmless(self, text: str) -> str:
        """Without what the judge's own template might mean by its control tokens."""
        if self.special_tokens == "refuse":
            check(CONTROL, text)
        return text if self.special_tokens == "rendered" else CONTROL.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text)

    def _key(self, question: Question) -> str:
        asked = json.dumps([self.model, self._messages(question)])
        return hashlib.sha256(asked.encode()).hexdigest()[:32]


class _Passing(Exception):
    """Something that may be over soon; ``wait``: seconds that the server asks for."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


def verdict_of(reply: str) -> Verdict | None:
    """A, B or tie of a reply; None where it says none, or several.

    A model that thinks aloud says it last, so only its last line counts where there are several."""
    lines = [line for line in reply.split("</think>")[-1].splitlines() if line.strip()]
    if lines and (alone := re.fullmatch(r"\W*(?:answer\s+)?(a|b|tie)\W*", lines[-1], re.IGNORECASE)):
        return "tie" if alone[1].lower() == "tie" else "A" if alone[1] in "aA" else "B"
    found = {word.upper() for word in re.findall(r"\b(?:A|B|[Tt]ie|TIE)\b", lines[-1])} if lines else set()
    if len(found) != 1:
        return None
    word = found.pop()
    return "tie" if word == "TIE" else "A" if word == "A" else "B"
