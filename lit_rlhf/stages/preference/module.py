"""Preference collection: K answers per prompt, by one or several models, ranked by an annotator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Callback
from pydantic import Field
from torch import Generator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.arguments import checked
from lit_rlhf.errors import UserError, Waiting, say_once
from lit_rlhf.files import Checked
from lit_rlhf.models.policy import context_length, freeze
from lit_rlhf.rollouts import Engine, FastEngine, Sampling, Temperature, sample
from lit_rlhf.stages.callables import Annotator, Reporting, with_tools
from lit_rlhf.stages.preference.annotator_agreement import agreement
from lit_rlhf.stages.preference.annotators import annotate, name_of, place
from lit_rlhf.stages.preference.people import People, judgements, with_lineage
from lit_rlhf.stages.progress_file import ProgressFile
from lit_rlhf.stages.prompts import Judge, PromptBatch, grades_of, last_tokens
from lit_rlhf.stages.records import FitContext
from lit_rlhf.text.chat import Transcript, encode_prompts, is_base
from lit_rlhf.text.records import load_records, parse_ranking, write_jsonl
from lit_rlhf.text.special_tokens import SpecialTokens
from lit_rlhf.text.template import Note
from lit_rlhf.text.transcripts import transcript_for
from lit_rlhf.training.all_processes import gather_step, global_batch_index
from lit_rlhf.training.batches import largest, seeded
from lit_rlhf.training.dry_run import Meter


class Turn(NamedTuple):
    """The model and temperature of an answer."""

    model: str
    temperature: float


class Drawn(Checked):
    """The fields of an answers record that are kept while a collection runs, and read when it goes on."""

    prompt: list[dict[str, Any]]
    responses: list[str]
    finished: list[bool]
    equal: int


@checked
class PreferenceModule(LightningModule):
    """Draws K answers to each prompt and has them ranked.

    Equal answers are drawn again, ``redraws`` times at most, and then dropped, so a prompt may be left with fewer than
    K; with fewer than two it is left out. Each batch draws from its own random generator and is on disk before the next
    begins, so a collection that was stopped goes on where it was and ends with the same records. Processes share out
    the batches; the first one has the answers ranked, in the batches' order, and writes.

    Args:
        policy: the model that answers. A base model goes on with a transcript of a human and an assistant (chat's);
            where it is one of ``others``, with the text alone.
        tokenizer: of the policy.
        annotator: ranks the answers; or people, whose judgements are read from a file; None: answers only.
        gold_judge: knows the right answers; how often the annotator agrees with it is among the figures. None: there is
            none.
        others: further models that answer too, name -> (model, tokenizer), each prompted by its own template.
        name: what the policy is called in the records.
        answers: "draw" samples them, "given" takes the ``responses`` of the prompts' records, to have them ranked.
        answers_per_prompt: K; they are dealt in turn over the models, then over the temperatures.
        sampling: how answers are drawn.
        engine: what draws them; None: :class:`FastEngine`.
        temperatures: several, in place of that of ``sampling``; None: that one.
        redraws: times that an answer which is equal to another one is drawn again.
        compare: ranking files of others about the same answers; agreement with them is among the figures.
        seed: of the sampling.
        progress_file: to which finished batches are written as they come; None keeps them in memory only.
        round: which round of collection this is; kept with each record.
        special_tokens: what their names mean in the prompts; see :class:`lit_rlhf.stages.prompts.PromptDataModule`.
        note: says what a person should know, each line once.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        annotator: Annotator | People | None,
        *,
        gold_judge: Judge | None = None,
        others: Mapping[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]] | None = None,
        name: str = "sft",
        answers: Literal["draw", "given"] = "draw",
        answers_per_prompt: Annotated[int, Field(ge=2, le=16)] = 4,
        sampling: Sampling = Sampling(),
        engine: Engine | None = None,
        temperatures: Annotated[list[Temperature], Field(min_length=1)] | None = None,
        redraws: Annotated[int, Field(ge=0)] = 2,
        compare: str | Sequence[str] | None = None,
        seed: int = 0,
        progress_file: str | Path | None = None,
        round: Annotated[int, Field(ge=0)] = 0,
        special_tokens: SpecialTokens = "plain",
        note: Note = say_once,
    ) -> None:
        super().__init__()
        if name in (others or {}):
            raise UserError(
                f"others (preference.models) has {name!r}, which is the policy's name; call one of them otherwise"
            )
        writers = {name: (policy, tokenizer), **(others or {})}
        self.policies = torch.nn.ModuleDict({name: freeze(policy) for name, (policy, _) in writers.items()})
        self.tokenizers = {name: tokenizer for name, (_, tokenizer) in writers.items()}
        self.name, self.annotator, self.gold_judge, self.how = name, annotator, gold_judge, answers
        self.special_tokens, self.note = special_tokens, note
        self.answers_per_prompt, self.redraws = answers_per_prompt, redraws
        self.sampling, self.engine, self.compare = sampling, engine or FastEngine(), compare
        # Models change fastest: each prompt is answered by as many of them as possible.
        self.turns = [Turn(w, t) for t in temperatures or [self.sampling.temperature] for w in writers]
        self.seed, self.round = seed, round
        self.drawn = ProgressFile(progress_file, tuple[int, list[Drawn]])
        ranks = progress_file and Path(progress_file).with_suffix(".ranks.jsonl")
        self.ranked = ProgressFile(ranks, tuple[int, list[list[int]]])
        self._judged: list[dict[str, Any]] = []  # by people
        self.transcript: Transcript | None = None  # what the policy goes on with where it is a base model

    def configure_callbacks(self) -> list[Callback]:
        return [FitContext(self.sampling.max_new_tokens)] if self.how == "draw" else []

    def setup(self, stage: str) -> None:
        tokenizer = self.tokenizers[self.name]
        if self.how == "draw" and self.transcript is None and is_base(tokenizer) and self.special_tokens != "rendered":
            self.transcript = transcript_for(tokenizer)
            self.tokenizers[self.name] = self.transcript.prompting(tokenizer)
            self.note(f"{self.name} is a base model: it goes on with {self.transcript}")

    def dry_run(self, meter: Meter, data: LightningDataModule) -> list[dict[str, Any]]:
        """Answers to one batch, by models without values; returns rankings of responses as long as allowed."""
        self.redraws, k, most = 0, self.answers_per_prompt, self.sampling.max_new_tokens
        self._draw(largest(data.predict_dataloader()), 0)
        tokens = data.tokenizer.encode(" word" * most, add_special_tokens=False)
        text = data.tokenizer.decode(tokens[: most - 3])
        ranked = {"responses": [f"{i} {text}" for i in range(k)], "ranks": [*range(1, k + 1)]}
        prompts = sorted([*data.train_prompts, *data.held_out_prompts], key=lambda p: len(p.tokens))[-256:]
        return [{"prompt": p.messages, **ranked} for p in prompts]

    # ---------------------------------------------------------------- answers

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Answers to one batch of prompts, and the ranks of what all processes have drawn, where the annotator can give
        them now; the answers."""
        place = global_batch_index(self._trainer, batch_idx)
        rows = self.drawn.results.get(place)
        if rows is None:
            rows = (self._given if self.how == "given" else self._draw)(batch, place)
        for number, drawn in gather_step(self._trainer, (place, rows), batch_idx):
            if number not in self.drawn.results:
                self.drawn.add(number, drawn)
            if self._ranks_now and self.trainer.is_global_zero and number not in self.ranked.results:
                self.ranked.add(number, self._ranks(drawn))
        return rows

    def _ranks(self, drawn: list[dict[str, Any]]) -> list[list[int]]:
        """By the annotator, of all rows that have something to be ranked."""
        rows = [row for row in drawn if len(row["responses"]) > 1]
        prompts, responses = [row["prompt"] for row in rows], [row["responses"] for row in rows]
        tools = with_tools(self.annotator, [row.get("tools") for row in rows], self.note)
        return annotate(self.annotator, prompts, responses, **tools) if rows else []

    @property
    def _ranks_now(self) -> bool:
        return self.annotator is not None and not isinstance(self.annotator, People)

    def _draw(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        k, n = self.answers_per_prompt, len(self.turns)
        turns = [[((batch_idx + i) * k + j) % n for j in range(k)] for i in range(len(batch.messages))]
        texts = [[""] * k for _ in turns]
        finished = [[True] * k for _ in turns]
        places = [(i, j) for i in range(len(turns)) for j in range(k)]
        for attempt in range(self.redraws + 1):
            for number, turn in enumerate(self.turns):
                mine = [(i, j) for i, j in places if turns[i][j] == number]
                generator = seeded(self.seed, self.round, batch_idx, number, attempt)
                for (i, j), drawn in zip(mine, self._sample(turn, batch, [i for i, _ in mine], generator)):
                    texts[i][j], finished[i][j] = drawn
            places = [(i, j) for i, row in enumerate(texts) for j in range(k) if row[j] in row[:j]]
            if not places:
                break
        return [
            self._row(
                batch, i, texts[i],
                models=[self.turns[t].model for t in turns[i]],
                temperatures=[self.turns[t].temperature for t in turns[i]],
                finished=finished[i],
            )
            for i in range(len(turns))
        ]  # fmt: skip

    def _sample(
        self, turn: Turn, batch: PromptBatch, prompts: list[int], generator: Generator
    ) -> list[tuple[str, bool]]:
        """(text, whether it ended by itself) for each of ``prompts``, numbers of prompts of the batch."""
        if not prompts:
            return []
        policy, tokenizer = self.policies[turn.model], self.tokenizers[turn.model]
        tokens, transcript = batch.tokens, self.transcript if turn.model == self.name else None
        if turn.model != self.name or transcript is not None:  # by its own template
            tools = [record.get("tools") for record in batch.records]
            reading = {"special_tokens": self.special_tokens, "note": self.note}
            tokens = encode_prompts(tokenizer, batch.messages, tools, **reading)
        room = context_length(policy) - self.sampling.max_new_tokens
        stops = () if transcript is None else transcript.stops
        sampling = replace(self.sampling, temperature=turn.temperature, stop=(*self.sampling.stop, *stops))
        tokens = last_tokens(turn.model, [tokens[i] for i in prompts], room, self.note)
        answers = sample(self.engine, policy, tokenizer, tokens, sampling, generator)
        return list(zip(answers.texts(tokenizer), answers.finished.tolist()))

    def _given(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        rows = []
        for i, (messages, record) in enumerate(zip(batch.messages, batch.records)):
            responses = record.get("responses")
            if not isinstance(responses, list) or not all(isinstance(text, str) for text in responses):
                raise UserError(
                    f"answers='given' (preference.module), and {place(messages)} has no 'responses', a list of texts"
                )
            defaults = {"models": None, "temperatures": None, "finished": True}
            known = {name: record.get(name) or [default] * len(responses) for name, default in defaults.items()}
            if wrong := [name for name, values in known.items() if len(values) != len(responses)]:
                raise UserError(
                    f"answers='given' (preference.module): {place(messages)} has {len(responses)} responses, and "
                    f"'{wrong[0]}' {len(known[wrong[0]])} entries; one per response was expected"
                )
            rows.append(self._row(batch, i, responses, **known))
        return rows

    def _row(self, batch: PromptBatch, i: int, texts: list[str], **per_answer: list[Any]) -> dict[str, Any]:
        """An answers record; of equal texts the first stays."""
        kept = [j for j, text in enumerate(texts) if text not in texts[:j]]
        return {
            "prompt": batch.messages[i],
            **({"tools": tools} if (tools := batch.records[i].get("tools")) else {}),
            "responses": [texts[j] for j in kept],
            **{name: [values[j] for j in kept] for name, values in per_answer.items()},
            "kind": batch.kinds[i],
            "split": "held_out" if batch.held_out[i] else "train",
            "round": self.round,
            "sampling": {
                "max_new_tokens": self.sampling.max_new_tokens,
                "top_k": self.sampling.top_k,
                "top_p": self.sampling.top_p,
            },
            "equal": len(texts) - len(kept),
        }

    # ---------------------------------------------------------------- records

    @property
    def answers(self) -> list[dict[str, Any]]:
        """Prompts with two different answers or more, in the prompts' order: records without ranks."""
        return [row for row in self._rows if len(row["responses"]) > 1]

    @property
    def _rows(self) -> list[dict[str, Any]]:
        return [row for index in sorted(self.drawn.results) for row in self.drawn.results[index]]

    @property
    def records(self) -> list[dict[str, Any]]:
        """All ranking records so far, in the prompts' order."""
        if not self._ranks_now:
            return self._judged
        ranks = [row for index in sorted(self.ranked.results) for row in self.ranked.results[index]]
        named = {"annotator": name_of(self.annotator)}
        return [{**answers, "ranks": row, **named} for answers, row in zip(self.answers, ranks)]

    def export(self, folder: Path) -> None:
        """Write answers and rankings to ``data/`` of the run that ``folder`` (its stage folder) belongs to.

        Raises ``Waiting``, with what to do next, where people have not judged anything yet."""
        file = folder.parent / "data" / f"answers-{self.round}.jsonl"
        if not self.answers:
            raise UserError(
                "preference: all answers to a prompt are the same text, for every prompt; draw them at a higher "
                "preference.sampling.temperature, or from further preference.models"
            )
        write_jsonl(file, self.answers)
        if isinstance(self.annotator, People):
            with_tools(self.annotator, [row.get("tools") for row in self.answers], self.note)
            todo = self.annotator.hand_out(self.answers, file)
            self._judged = with_lineage(judgements(self.annotator), self.answers)
            if not self._judged:
                raise Waiting(
                    f"preference: {len(self.answers):,} prompts with their answers are in {file}. {todo}. Then run the "
                    "same command again; nothing is drawn anew"
                )
        if self.annotator is not None:
            write_jsonl(file.with_name(f"rankings-{self.round}.jsonl"), self.records)
        if self._ranks_now:
            self.drawn.remove()
            self.ranked.remove()

    # ---------------------------------------------------------------- figures

    def figures(self) -> dict[str, Any]:
        """Headline figures of the collection."""
        rows, answers, records = self._rows, self.answers, self.records
        texts = [text for row in answers for text in row["responses"]]
        pairs = [(a, b) for r in records for a, b in combinations(r["ranks"], 2)]
        untied = sum(a != b for a, b in pairs)
        nothing = f"all {len(pairs)} pairs of answers tie: a reward model has nothing to learn from them"
        ranked = {(str(r["prompt"]), text) for r in records for text in r["responses"]}
        return {
            "rankings": len(records),
            "answers": len(texts),
            "pairs": untied,
            "ties": len(pairs) - untied,
            "words": sum(len(text.split()) for text in texts) / max(len(texts), 1),
            "cut_off": sum(not f for row in answers for f in row["finished"]),
            "equal": sum(row["equal"] for row in rows),
            "left_out": len(rows) - len(answers),
            "unjudged": sum(
                sum((str(row["prompt"]), text) in ranked for text in row["responses"]) < 2 for row in answers
            ),
            **self._gold_agreement(),
            **self._agreement(),
            **({"warning": nothing} if pairs and not untied else {}),
            **(self.annotator.figures() if isinstance(self.annotator, Reporting) else {}),
        }

    def _gold_agreement(self) -> dict[str, Any]:
        """How often the annotator agrees with the gold judge, over the pairs that gold does not tie."""
        judge = self.gold_judge
        if judge is None:
            return {"agreement": None}
        agreed = []
        for r in self.records:
            finished = r.get("finished", [True] * len(r["responses"]))
            asked = [r["prompt"]] * len(finished)
            gold = [grade.gold for grade in grades_of(judge, asked, r["responses"], finished)]
            for i, j in combinations(range(len(gold)), 2):
                if gold[i] != gold[j] and r["ranks"][i] != r["ranks"][j]:
                    agreed.append((gold[i] > gold[j]) == (r["ranks"][i] < r["ranks"][j]))
        return {"agreement": sum(agreed) / max(len(agreed), 1)}

    def _agreement(self) -> dict[str, Any]:
        """How far annotators agree with each other, where several judged the same answers."""
        records = list(self.records)
        if isinstance(self.annotator, People):  # each one's own words, whatever is made of them
            records = [{**vars(r), **r.lineage} for r in self.annotator.read()]
        for path in [self.compare] if isinstance(self.compare, str) else self.compare or []:
            records += [vars(r) for r in load_records(path, parse_ranking).records]
        found = agreement(records)
        return {} if found is None else found._asdict()
