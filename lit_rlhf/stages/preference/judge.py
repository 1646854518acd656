"""A language model as the judge, behind an OpenAI-compatible URL (vLLM, llama.cpp, Ollama, OpenAI ...)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx

from lit_rlhf.errors import UserError
from lit_rlhf.stages.callables import Ranks, place
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
from lit_rlhf.text.records import Messages, ranks_of
from lit_rlhf.text.special_tokens import SpecialTokens
from lit_rlhf.text.template_form import Tools

Verdict = Literal["A", "B", "tie", "?"]  # ?: the reply said none of them, however often it was asked

BY_PLACE = 0.8  # share of pairs in which a judge that prefers the same place in both orders is said to be none
INSTRUCTION = """\
You compare two answers of an assistant to the same dialogue. The better one is more helpful, truthful and harmless; \
length, order and tone alone do not make it better. Reply with one word: A, B, or tie."""

ASKED = Path(__file__).with_name("judge_question.txt").read_text(encoding="utf-8").rstrip("\n")


class PairQuestion(NamedTuple):
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
        self.server = Endpoint("annotator", url, self._kept, api_key_env=api_key_env, **asking)
        self.model, self.instruction, self.max_tokens = model, instruction or INSTRUCTION, max_tokens
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
            PairQuestion(prompt, *order, of_prompt)
            for prompt, answers, of_prompt in asked
            for pair in combinations(dict.fromkeys(answers), 2)  # equal answers are not compared
            for order in (pair, pair[::-1])
        ]
        self.server.ask_all({self._key(q): q for q in questions if self._key(q) not in self.verdicts}, self._ask)
        self._check_sense(questions)
        return [self._ranks(*each) for each in asked]

    def figures(self) -> dict[str, Any]:
        """Figures of the judging: verdicts asked for, how many were none, and the share of pairs in which both orders
        preferred the same place; a ``warning`` where that is nearly all of them."""
        said, by_place = list(self.verdicts.values()), list(self._compared.values())
        figures = {"judge_verdicts": len(said), "judge_nonsense": said.count("?")}
        if not by_place:
            return figures
        share = sum(by_place) / len(by_place)
        warning = f"{self.model} prefers the place and not the answer in {share:.0%} of the pairs, which tie: no judge"
        return figures | {"judge_by_place": share} | ({"warning": warning} if share > BY_PLACE else {})

    @staticmethod
    def questions(answers: int) -> int:
        """The most that it is asked about so many answers to a prompt."""
        return answers * (answers - 1)

    def better(self, prompt: Messages, first: str, second: str, tools: Tools = None) -> float:
        """1 where the first answer wins, 0 where the second does, 0.5 for a tie or where the order decided."""
        key = self._key(PairQuestion(prompt, first, second, tools))
        verdict = self.verdicts[key]
        swapped = self.verdicts[self._key(PairQuestion(prompt, second, first, tools))]
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

    async def _ask(self, key: str, question: PairQuestion, client: httpx.AsyncClient) -> None:
        """Keep the verdict; "?" where no reply had one."""

        def body(again: bool) -> dict[str, Any]:
            return question_to(self.model, self._messages(question), self.max_tokens, again)

        about = place(question.prompt)
        said, reply = await self.server.reply(client, "/chat/completions", body, completion_text, verdict_of, about)
        self.verdicts[key] = said or "?"
        self.progress.add(key, self.verdicts[key], self.server.scrubbed(reply or "")[-200:])

    def _kept(self) -> str:
        return f"{len(self.verdicts)} verdicts are kept" + (f" in {self.progress.path}" if self.progress.path else "")

    def _check_sense(self, questions: Sequence[PairQuestion]) -> None:
        """A reply here and there may be no verdict, and counts as a tie; a judge that never gives one is none."""
        without = [q for q in questions if self.verdicts[self._key(q)] == "?"]
        if len(without) > len(questions) / 2:
            raise UserError(
                f"annotator: {self.model} gave no verdict on {len(without)} of {len(questions)} questions, "
                f"the first on {place(without[0].prompt)}; A, B or tie was expected. Its replies are in "
                f"{self.progress.path or 'its progress_file'}; take another model, another "
                "annotator.instruction, or more max_tokens for one that thinks aloud"
            )

    def _messages(self, question: PairQuestion) -> Messages:
        dialogue = dialogue_text(question.prompt, question.tools)
        parts = (harmless(text, self.special_tokens) for text in (dialogue, question.first, question.second))
        asked = ASKED.format(**dict(zip(("dialogue", "first", "second"), parts)))
        return [{"role": "system", "content": self.instruction}, {"role": "user", "content": asked}]

    def _key(self, question: PairQuestion) -> str:
        asked = json.dumps([self.model, self._messages(question)])
        return hashlib.sha256(asked.encode()).hexdigest()[:32]


def verdict_of(reply: str) -> Verdict | None:
    """A, B or tie of a reply; None where it says none, or several.

    A model that thinks aloud says it last, so only its last line counts where there are several."""
    line = last_line(reply)
    if alone := re.fullmatch(r"\W*(?:answer\s+)?(a|b|tie)\W*", line, re.IGNORECASE):
        return "tie" if alone[1].lower() == "tie" else "A" if alone[1] in "aA" else "B"
    found = {word.upper() for word in re.findall(r"\b(?:A|B|[Tt]ie|TIE)\b", line)}
    if len(found) != 1:
        return None
    word = found.pop()
    return "tie" if word == "TIE" else "A" if word == "A" else "B"
