"""What scores answers from another process or machine: a language model that rates them, a server of one's own."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch

from lit_rlhf.arguments import checked
from lit_rlhf.errors import UserError
from lit_rlhf.processes import this_process
from lit_rlhf.stages.answer_scores import is_score
from lit_rlhf.stages.callables import place
from lit_rlhf.stages.endpoint import (
    API_KEY,
    Backoff,
    Count,
    Endpoint,
    KeyVariable,
    Retries,
    Seconds,
    completion_text,
    dialogue_text,
    harmless,
    last_line,
    question_to,
)
from lit_rlhf.stages.progress_file import ProgressFile
from lit_rlhf.text.chat import Transcript
from lit_rlhf.text.records import Messages
from lit_rlhf.text.special_tokens import SpecialTokens

INSTRUCTION = """\
You rate an answer of an assistant to a dialogue. A good answer is helpful, truthful and harmless; length and tone \
alone do not make it better. Reply with one number, from {lowest:g} (worst) to {highest:g} (best)."""
ASKED = "The dialogue:\n{dialogue}\n\nThe answer:\n{answer}\n\nYour rating, from {lowest:g} to {highest:g}:"
SETTING = "reward_model"  # where the settings of all of them stand, in a stage's


class Asked(NamedTuple):
    """An answer to be scored."""

    prompt: Messages
    response: str
    record: dict[str, Any]  # the further fields of the prompt's record, ``tools`` say


class RemoteScorer(ABC):
    """Scores of answers by a server, which is asked about each of them once; they are on disk as they come.

    Where the server is down for good the call ends in a ``UserError``; the next one asks only what is still open."""

    name: str

    def __init__(self, url: str, progress_file: str | Path | None, **asking: Any) -> None:
        self.server = Endpoint(SETTING, url, self._kept, **asking)
        self.unasked = torch.empty(0).is_meta  # in a dry run, whose models have no values
        rank = this_process().rank  # each process asks about its own answers
        file = progress_file and Path(progress_file).with_suffix(f".{rank}.jsonl" if rank else ".jsonl")
        self.progress = ProgressFile(None if self.unasked else file, tuple[str, float | None], by_all=True)
        self.scores: dict[str, float | None] = self.progress.results

    def __call__(self, prompts: Sequence[Messages], responses: Sequence[str], **record: Any) -> list[float | None]:
        if self.unasked:
            return [0.0] * len(responses)
        columns = [dict(zip(record, values)) for values in zip(*record.values())] or [{}] * len(responses)
        answers = [*map(Asked, prompts, responses, columns)]
        keys = [self._key(answer) for answer in answers]
        self._ask_open({key: answer for key, answer in zip(keys, answers) if key not in self.scores})
        return [self.scores[key] for key in keys]

    def _key(self, asked: Asked) -> str:
        content = json.dumps([self.server.url, self.content(asked)], default=str, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def _kept(self) -> str:
        return f"{len(self.scores)} scores are kept" + (f" in {self.progress.path}" if self.progress.path else "")

    @abstractmethod
    def content(self, asked: Asked) -> Any:
        """What the server is told of an answer, and its score depends on."""

    @abstractmethod
    def _ask_open(self, still_open: dict[str, Asked]) -> None:
        """Ask for the scores that are not known, and keep them."""


@checked
class LLMScorer(RemoteScorer):
    """Scores answers by asking a language model behind an OpenAI-compatible URL for a rating of each.

    A reply without a number is asked for again, and then says nothing of the answer.

    Args:
        url: of the API, up to and with its version: the requests go to ``<url>/chat/completions``.
        model: its name there.
        instruction: the system message; None: helpful, truthful, harmless, and the range.
        lowest: the worst rating.
        highest: the best one; a number outside of the two is none.
        max_tokens: of a reply.
        special_tokens: names of control tokens in dialogues and answers, as for
            :class:`lit_rlhf.stages.preference.LLMJudge`.
        progress_file: of the scores so far; None keeps them in memory. Further processes have one each beside it.

    The others are those of :class:`lit_rlhf.stages.endpoint.Endpoint`."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        instruction: str | None = None,
        lowest: float = 1.0,
        highest: float = 10.0,
        api_key_env: KeyVariable = API_KEY,
        concurrency: Count = 8,
        timeout: Seconds = 60.0,
        retries: Retries = 5,
        backoff: Backoff = 1.0,
        max_tokens: Count = 16,
        special_tokens: SpecialTokens = "plain",
        progress_file: str | Path | None = None,
    ) -> None:
        asking = {"concurrency": concurrency, "timeout": timeout, "retries": retries, "backoff": backoff}
        super().__init__(url, progress_file, api_key_env=api_key_env, **asking)
        if not lowest < highest:
            raise UserError(f"{SETTING}: lowest={lowest:g} and highest={highest:g}; the highest rating must be above")
        self.model, self.max_tokens, self.special_tokens = model, max_tokens, special_tokens
        self.range = {"lowest": lowest, "highest": highest}
        self.instruction = instruction or INSTRUCTION.format(**self.range)
        self.name = f"llm_judge:{model}"
        for key in [key for key, score in self.scores.items() if score is None]:
            del self.scores[key]  # nonsense is asked for again

    def __call__(self, prompts: Sequence[Messages], responses: Sequence[str], **record: Any) -> list[float | None]:
        scores = super().__call__(prompts, responses, **record)
        self._check_sense(prompts, scores)
        return scores

    def content(self, asked: Asked) -> list[Any]:
        dialogue = dialogue_text(asked.prompt, asked.record.get("tools"))
        dialogue, answer = (harmless(text, self.special_tokens) for text in (dialogue, asked.response))
        text = ASKED.format(dialogue=dialogue, answer=answer, **self.range)
        return [
            self.model,
            [{"role": "system", "content": self.instruction}, {"role": "user", "content": text}],
        ]

    def _ask_open(self, still_open: dict[str, Asked]) -> None:
        self.server.ask_all(still_open, self._ask)

    def _check_sense(self, prompts: Sequence[Messages], scores: Sequence[float | None]) -> None:
        """A reply here and there may be no rating; a judge that hardly ever gives one is none."""
        silent = [prompt for prompt, score in zip(prompts, scores) if score is None]
        if len(silent) > len(scores) / 2:
            raise UserError(
                f"{SETTING}: {self.model} gave no rating of {len(silent)} of {len(scores)} answers, the first to "
                f"{place(silent[0])}; a number from {self.range['lowest']:g} to {self.range['highest']:g} was "
                f"expected. Its replies are in {self.progress.path or 'its progress_file'}; take another model, "
                "another instruction, or more max_tokens for one that thinks aloud"
            )

    async def _ask(self, key: str, asked: Asked, client: httpx.AsyncClient) -> None:
        def body(again: bool) -> dict[str, Any]:
            return question_to(*self.content(asked), self.max_tokens, again)

        about, parse = place(asked.prompt), partial(rating_of, **self.range)
        score, reply = await self.server.reply(client, "/chat/completions", body, completion_text, parse, about)
        self.progress.add(key, score, self.server.scrubbed(reply or "")[-200:])


def rating_of(reply: str, lowest: float, highest: float) -> float | None:
    """The one number in the last line of a reply, 7 of ``So: 7/10``; None where there is none in the range, or several.

    >>> rating_of("Clear, but wrong.\\nRating: 3 out of 10", 1, 10), rating_of("Fine.", 1, 10), rating_of("99", 1, 10)
    (3.0, None, None)
    """
    said = re.sub(r"(?:/|\bof)\s*\d+(?:\.\d+)?", "", last_line(reply))
    numbers = {float(number) for number in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?", said)}
    return next(iter(numbers)) if len(numbers) == 1 and lowest <= min(numbers) <= highest else None


@checked
class HTTPScorer(RemoteScorer):
    """Scores answers by a server of yours: POST ``{"prompts": [...], "responses": [...]}`` to the URL, a list of
    numbers back, null where it says nothing of an answer.

    Args:
        url: of the server, with the path.
        fields: what is sent, ours -> the server's name of it, a list each: ``prompts`` (lists of messages),
            ``responses``, ``texts`` (prompt and answer as a transcript, ``Human: ...``), or a field of the prompts'
            records.
        reply: where in the reply the scores are, ``scores`` or ``data.rewards``; "": it is the list.
        batch_size: answers per request, at most.
        progress_file: of the scores so far; None keeps them in memory. Further processes have one each beside it.

    The others are those of :class:`lit_rlhf.stages.endpoint.Endpoint`."""

    def __init__(
        self,
        url: str,
        *,
        fields: Mapping[str, str] | None = None,
        reply: str = "scores",
        batch_size: Count = 16,
        api_key_env: KeyVariable = API_KEY,
        concurrency: Count = 8,
        timeout: Seconds = 60.0,
        retries: Retries = 5,
        backoff: Backoff = 1.0,
        progress_file: str | Path | None = None,
    ) -> None:
        asking = {"concurrency": concurrency, "timeout": timeout, "retries": retries, "backoff": backoff}
        super().__init__(url, progress_file, api_key_env=api_key_env, **asking)
        self.fields = dict(fields or {"prompts": "prompts", "responses": "responses"})
        self.where, self.batch_size, self.name = reply, batch_size, "HTTP scorer"

    def content(self, asked: Asked) -> dict[str, Any]:
        known = {**asked.record, "prompts": asked.prompt, "responses": asked.response}
        if "texts" in self.fields:
            known["texts"] = Transcript().text([*asked.prompt, {"role": "assistant", "content": asked.response}])
        if missing := [name for name in self.fields if name not in known]:
            there = ", ".join(sorted({*known, "texts"}))
            raise UserError(f"{SETTING}.fields: there is no {missing[0]!r} of an answer; there are {there}")
        return {theirs: known[ours] for ours, theirs in self.fields.items()}

    def _ask_open(self, still_open: dict[str, Asked]) -> None:
        keys = list(still_open)
        batches = [keys[i : i + self.batch_size] for i in range(0, len(keys), self.batch_size)]
        self.server.ask_all({batch[0]: {k: still_open[k] for k in batch} for batch in batches}, self._ask)

    async def _ask(self, _: str, batch: dict[str, Asked], client: httpx.AsyncClient) -> None:
        rows = [self.content(asked) for asked in batch.values()]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        about = f"{len(batch)} answers, the first to {place(next(iter(batch.values())).prompt)}"
        read = partial(self._read, count=len(batch))
        scores, _reply = await self.server.reply(client, "", lambda _: columns, read, lambda found: found, about)
        for key, score in zip(batch, scores or ()):
            self.progress.add(key, score)

    def _read(self, reply: Any, count: int) -> list[float | None]:
        for part in filter(None, self.where.split(".")):
            if not isinstance(reply, dict) or part not in reply:
                found = f"has {', '.join(reply) or 'nothing'}" if isinstance(reply, dict) else f"is {str(reply)[:60]!r}"
                raise ValueError(f"no {part!r} in its reply, which {found}; reply= says where the scores are")
            reply = reply[part]
        if not isinstance(reply, list) or len(reply) != count:
            found = f"a list of {len(reply)}" if isinstance(reply, list) else f"a {type(reply).__name__}"
            raise ValueError(f"{found} where {count} scores were expected ({self.where or 'the reply itself'})")
        if others := [score for score in reply if isinstance(score, bool | list | dict)]:
            raise ValueError(f"{others[0]} is no score")
        scores = [None if score is None else float(score) for score in reply]
        if wrong := [score for score in scores if score is not None and not is_score(score)]:
            raise ValueError(f"{wrong[0]} is no score")
        return scores
