"""Servers that are asked over HTTP: many questions at a time, tried again, and nothing that was said is lost."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, TypeVar

import httpx
from pydantic import AfterValidator, Field

from lit_rlhf.errors import CREDENTIALS, UserError, scrubbed
from lit_rlhf.stages.callables import run_async
from lit_rlhf.text.records import Messages, text_of
from lit_rlhf.text.special_tokens import SpecialTokens, check
from lit_rlhf.text.template_form import Tools

Question, Reply, Found = TypeVar("Question"), TypeVar("Reply"), TypeVar("Found")

# What templates of many families have as control tokens: which of them the model behind a URL has, nobody says.
CONTROL = re.compile(
    r"<[|\uff5c][^<>\s]{1,60}>|<[^<>\s]{1,60}[|\uff5c]>|</?s>|<(?:bos|eos|pad|unk|sep|mask|[es]o[cdmpst])>|<EO[A-Z]>|"
    r"<(?:start|end)_of_\w+>|<?</?SYS>>?|<_\w+>|<(?:extra_id_|unused|reserved_|SPECIAL_)\d+>|</?tool_response>|"
    r"\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|[gs]MASK|MASK|BOS|EOS|CLS|SEP|PAD|UNK)\]|"
    r"\]~!?b[\[\]]|\[e~\["
)

API_KEY = "OPENAI_API_KEY"


def variable(name: str) -> str:
    """The name of an environment variable that may hold a key; ``UserError`` where it looks like the key itself."""
    if name != API_KEY and (name not in os.environ or not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name)):
        raise UserError(f"the name of an environment variable that is set was expected, in capitals as {API_KEY} is")
    return name


KeyVariable = Annotated[str, AfterValidator(variable)]
Count, Seconds = Annotated[int, Field(ge=1)], Annotated[float, Field(gt=0)]
Retries, Backoff = Annotated[int, Field(ge=0)], Annotated[float, Field(ge=0)]


class Endpoint:
    """A server that is asked by POST requests of JSON.

    Args:
        setting: where its settings stand, as messages name it.
        url: of the server; requests go to paths below it.
        kept: says, when the server stays away, what is kept of its replies.
        api_key_env: name of the environment variable that holds the key, or a whole ``Authorization`` header
            (``Basic ...``); where ``OPENAI_API_KEY`` is not set, none is sent. It goes to this URL alone: no redirect
            is followed.
        concurrency: requests at the same time.
        timeout: seconds per request.
        retries: times that a request which failed, or a reply that says nothing, is asked again.
        backoff: seconds before the first retry, twice as many before each further one, at most 60.
    """

    def __init__(
        self,
        setting: str,
        url: str,
        kept: Callable[[], str],
        *,
        api_key_env: str,
        concurrency: int,
        timeout: float,
        retries: int,
        backoff: float,
    ) -> None:
        if not url.startswith(("http://", "https://")) or CREDENTIALS.search(url):
            raise UserError(
                f"url ({setting}): http://... or https://... was expected, without a password or key, which "
                "api_key_env names"
            )
        self.setting, self.url, self.kept, self.api_key_env = setting, url.rstrip("/"), kept, variable(api_key_env)
        self.concurrency, self.timeout, self.retries, self.backoff = concurrency, timeout, retries, backoff

    def ask_all(
        self,
        questions: Mapping[str, Question],
        ask: Callable[[str, Question, httpx.AsyncClient], Awaitable[None]],
    ) -> None:
        """``ask(key, question, client)`` for each; after the first that fails nothing new is asked, what is on its way
        is waited for, and its ``UserError`` is raised."""
        if questions:
            run_async(self._ask_all(questions, ask))

    async def _ask_all(self, questions: Mapping[str, Question], ask: Callable[..., Awaitable[None]]) -> None:
        turns = asyncio.Semaphore(self.concurrency)
        failed: list[Exception] = []

        async def take(key: str, question: Question, client: httpx.AsyncClient) -> None:
            async with turns:
                if failed:
                    return
                try:
                    await ask(key, question, client)
                except UserError as error:
                    failed.append(error)

        headers = {"Authorization": key if " " in key else f"Bearer {key}"} if (key := self._api_key) else {}
        limits = httpx.Limits(max_connections=self.concurrency)
        async with httpx.AsyncClient(timeout=self.timeout, headers=headers, limits=limits) as client:
            await asyncio.gather(*(take(key, question, client) for key, question in questions.items()))
        if failed:
            raise failed[0]

    @property
    def _api_key(self) -> str:
        key = os.environ.get(self.api_key_env, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{self.api_key_env}: the key holds characters that no header can; set it again")
        return key

    def scrubbed(self, text: str) -> str:
        """What a server said, without the key, which some servers repeat."""
        return scrubbed(text, self._api_key, self._api_key.rpartition(" ")[2])

    async def reply(
        self,
        client: httpx.AsyncClient,
        path: str,
        body: Callable[[bool], dict[str, Any]],
        read: Callable[[Any], Reply],
        parse: Callable[[Reply], Found | None],
        about: str,
    ) -> tuple[Found | None, Reply | None]:
        """(What ``parse`` found in a reply, that reply), None where it found nothing in the last one.

        ``body(again)``: what is sent, ``again`` where a reply said nothing; ``read`` takes a reply out of the JSON, and
        may raise for another one; ``about``: what is asked about, for messages."""
        reply: Reply | None = None
        for attempt in range(self.retries + 1):
            try:
                reply = await self._request(client, path, body(reply is not None), read, about)
            except _Passing as error:
                if attempt == self.retries:
                    raise self._down(error, about) from None
                await asyncio.sleep(error.wait or self._pause(attempt))
                continue
            if (found := parse(reply)) is not None:
                return found, reply
        return None, reply

    def _pause(self, attempt: int) -> float:
        """Seconds; not the same for all, so that they do not come back together."""
        return min(60.0, self.backoff * 2**attempt) * random.uniform(0.5, 1.0)

    async def _request(
        self, client: httpx.AsyncClient, path: str, body: dict[str, Any], read: Callable[[Any], Reply], about: str
    ) -> Reply:
        """The reply. Raises ``_Passing`` for what may be over soon, ``UserError`` for what will not."""
        try:
            response = await client.post(f"{self.url}{path}", json=body)
        except httpx.HTTPError as error:  # no connection, time out, half a reply
            raise _Passing(self.scrubbed(f"{type(error).__name__}: {error}")) from None
        if not response.is_success:
            raise self._refused(response, about)
        try:
            return read(response.json())
        except (ValueError, LookupError, TypeError, OverflowError) as error:  # no JSON, other JSON
            raise _Passing(self.scrubbed(f"{type(error).__name__}: {error}")) from None

    def _refused(self, response: httpx.Response, about: str) -> Exception:
        said, code = " ".join(self.scrubbed(response.text)[:300].split()), response.status_code
        if code in (408, 409, 425, 429) or code >= 500:
            wait = response.headers.get("Retry-After", "")
            return _Passing(f"HTTP {code} {said}", min(float(wait), 60.0) if wait.isdecimal() else None)
        hints = {
            401: f"set the key: export {self.api_key_env}=...",
            403: f"set the key: export {self.api_key_env}=...",
            404: "the URL ends with the API's version, http://127.0.0.1:8000/v1 say, and model= is a name it knows"
            if response.request.url.path.endswith("/chat/completions")
            else "the URL is the server's own, with the path",
        }
        if response.has_redirect_location:
            hints[code] = f"it points to {self.scrubbed(response.headers['Location'])}, where nothing was sent"
        hint = hints.get(code, "what is asked about may be longer than it takes")
        return UserError(f"{self.setting}: {self.url} refused the question (HTTP {code}: {said}) on {about}; {hint}")

    def _down(self, error: Exception, about: str) -> UserError:
        return UserError(
            f"{self.setting}: {self.url} did not answer ({' '.join(str(error).split())}) in {self.retries + 1} "
            f"attempts, the last on {about}. {self.kept()}; run the same command when the server is there again, and "
            "it goes on"
        )


class _Passing(Exception):
    """Something that may be over soon; ``wait``: seconds that the server asks for."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


def question_to(model: str, messages: Messages, max_tokens: int, again: bool) -> dict[str, Any]:
    """The body of a chat completion. A cold model whose reply said nothing would give the same again."""
    return {"model": model, "messages": messages, "temperature": 0.7 if again else 0.0, "max_tokens": max_tokens}


def dialogue_text(prompt: Messages, tools: Tools = None) -> str:
    """A dialogue as a model that judges reads it, behind what the assistant may call."""
    dialogue = "\n\n".join(f"{m['role']}: {text_of(m)}" for m in prompt)
    given = f"functions that the assistant may call: {json.dumps(tools, ensure_ascii=False)}\n\n" if tools else ""
    return given + dialogue


def last_line(reply: str) -> str:
    """The last line of a reply, where a model that thinks aloud says what it comes to; "" of an empty one."""
    lines = [line for line in reply.split("</think>")[-1].splitlines() if line.strip()]
    return lines[-1] if lines else ""


def completion_text(reply: Any) -> str:
    """What a chat completion says."""
    return str(reply["choices"][0]["message"]["content"] or "")


def harmless(text: str, special_tokens: SpecialTokens) -> str:
    """Text without what a server's template might mean by its control tokens: "plain" puts a space into them, "refuse"
    is an error, "rendered" leaves them."""
    if special_tokens == "refuse":
        check(CONTROL, text)
    return text if special_tokens == "rendered" else CONTROL.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text)
