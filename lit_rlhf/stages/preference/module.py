"""Preference collection: K answers a prompt, ranked by an annotator."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

from lightning import LightningModule
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.models import Sampling, answer, freeze
from lit_rlhf.stages.prompts import PromptBatch
from lit_rlhf.text.records import Messages, write_jsonl
from lit_rlhf.training import seeded


class Annotator(Protocol):
    """Whoever ranks answers: a simulated labeler, a model, a person."""

    def __call__(self, prompts: Sequence[Messages], responses: Sequence[Sequence[str]]) -> list[list[int]]:
        """K answers a prompt in; K ranks a prompt out, 1 = best, ties allowed."""
        ...


class PreferenceModule(LightningModule):
    """Samples K answers to each prompt and has them ranked.

    Each batch draws from its own random generator and is on disk before the next begins, so a collection that was
    stopped goes on with the prompt it had reached and ends with the same records.

    Args:
        policy: the model that answers.
        tokenizer: of the policy.
        annotator: ranks the answers.
        answers_per_prompt: K.
        sampling: how answers are drawn.
        seed: of the sampling.
        journal: file to which finished batches are written as they come; None keeps them in memory only.
        round: which round of collection this is; kept with each record.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        annotator: Annotator,
        *,
        answers_per_prompt: Annotated[int, Field(ge=2, le=16)] = 4,
        sampling: Sampling | None = None,
        seed: int = 0,
        journal: str | Path | None = None,
        round: Annotated[int, Field(ge=0)] = 0,
    ) -> None:
        super().__init__()
        self.policy = freeze(policy)
        self.tokenizer, self.annotator = tokenizer, annotator
        self.answers_per_prompt, self.sampling = answers_per_prompt, sampling or Sampling()
        self.seed, self.round = seed, round
        self.journal = None if journal is None else Path(journal)
        self.batches: dict[int, list[dict[str, Any]]] = _read_journal(self.journal)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Ranking records of one batch of prompts."""
        if batch_idx not in self.batches:
            self.batches[batch_idx] = self._rank(batch, batch_idx)
            if self.journal is not None:
                self.journal.parent.mkdir(parents=True, exist_ok=True)
                with self.journal.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([batch_idx, self.batches[batch_idx]], ensure_ascii=False) + "\n")
        return self.batches[batch_idx]

    def _rank(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        k = self.answers_per_prompt
        tokens = [tokens for tokens in batch.tokens for _ in range(k)]
        generator = seeded(self.seed, self.round, batch_idx, device=self.device)
        answers = answer(self.policy, self.tokenizer, tokens, self.sampling, generator)
        texts = answers.texts(self.tokenizer)
        finished = answers.finished.tolist()
        grouped = [texts[i : i + k] for i in range(0, len(texts), k)]
        ranks = self.annotator(batch.messages, grouped)
        return [
            {
                "prompt": messages,
                "responses": responses,
                "ranks": rank,
                "annotator": getattr(self.annotator, "name", type(self.annotator).__name__),
                "kind": kind,
                "split": "held_out" if held_out else "train",
                "round": self.round,
                "finished": finished[i * k : (i + 1) * k],
                "sampling": {"temperature": self.sampling.temperature, "max_new_tokens": self.sampling.max_new_tokens},
            }
            for i, (messages, responses, rank, kind, held_out) in enumerate(
                zip(batch.messages, grouped, ranks, batch.kinds, batch.held_out)
            )
        ]

    @property
    def records(self) -> list[dict[str, Any]]:
        """All ranking records so far, in the prompts' order."""
        return [record for index in sorted(self.batches) for record in self.batches[index]]

    def figures(self) -> dict[str, Any]:
        """Headline figures of the collection."""
        records = self.records
        pairs = [(a, b) for r in records for i, a in enumerate(r["ranks"]) for b in r["ranks"][:i]]
        answers = [text for r in records for text in r["responses"]]
        return {
            "rankings": len(records),
            "answers": len(answers),
            "pairs": sum(a != b for a, b in pairs),
            "ties": sum(a == b for a, b in pairs),
            "words": sum(len(text.split()) for text in answers) / len(answers),
            "cut_off": sum(not f for r in records for f in r["finished"]),
            **self._agreement(),
        }

    def _agreement(self) -> dict[str, Any]:
        """How often the annotator agrees with the gold judge, over the pairs that gold does not tie."""
        judge = getattr(self.trainer.datamodule, "judge", None)
        if judge is None:
            return {"agreement": None}
        agreed = []
        for r in self.records:
            gold = [judge.grade(r["prompt"], t, not f).gold for t, f in zip(r["responses"], r["finished"])]
            for i in range(len(gold)):
                for j in range(i):
                    if gold[i] != gold[j] and r["ranks"][i] != r["ranks"][j]:
                        agreed.append((gold[i] > gold[j]) == (r["ranks"][i] < r["ranks"][j]))
        return {"agreement": sum(agreed) / max(len(agreed), 1)}

    def export(self, folder: Path) -> None:
        """Write the records to ``data/`` of the run that ``folder`` (its stage folder) belongs to."""
        write_jsonl(folder.parent / "data" / f"rankings-{self.round}.jsonl", self.records)
        if self.journal is not None:
            self.journal.unlink(missing_ok=True)


def _read_journal(journal: Path | None) -> dict[int, list[dict[str, Any]]]:
    batches: dict[int, list[dict[str, Any]]] = {}
    if journal is None or not journal.exists():
        return batches
    for line in journal.read_text(encoding="utf-8").splitlines():
        try:
            index, records = json.loads(line)
        except json.JSONDecodeError:  # the line that was being written when the process was killed
            break
        batches[index] = records
    write = journal.with_name(journal.name + ".tmp")
    write.write_text("".join(json.dumps([i, r], ensure_ascii=False) + "\n" for i, r in batches.items()), "utf-8")
    write.replace(journal)
    return batches
