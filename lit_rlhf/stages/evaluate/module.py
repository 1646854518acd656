"""Evaluation: models answer the same held-out prompts; who wins, by how much, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Callback
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.arguments import checked
from lit_rlhf.errors import UserError, say, say_once
from lit_rlhf.functional import masked_sum, sequence_kl
from lit_rlhf.models.batching import Batching
from lit_rlhf.models.heads import AnyRewardModel
from lit_rlhf.models.micro_batches import tokens_at_once
from lit_rlhf.models.policy import context_length, freeze, shares_prompts
from lit_rlhf.models.responses import response_logprobs, stacked
from lit_rlhf.rollouts import Engine, FastEngine, Responses, Sampling, sample
from lit_rlhf.stages.answer_scores import RewardModel, frozen, record_of, scores_by, title_of
from lit_rlhf.stages.callables import Annotator, Questioning, Reporting, name_of, with_tools
from lit_rlhf.stages.evaluate.answers import Answers, JudgeName
from lit_rlhf.stages.evaluate.comparison import PROMPTED, Comparison
from lit_rlhf.stages.evaluate.harness import Benchmark
from lit_rlhf.stages.evaluate.text import text_figures
from lit_rlhf.stages.prompts import Judge, PromptBatch, grades_of, last_tokens, repeated
from lit_rlhf.stages.records import FitContext
from lit_rlhf.text.chat import encode_prompts, encode_responses
from lit_rlhf.text.packing import Packed
from lit_rlhf.text.records import write_jsonl
from lit_rlhf.text.special_tokens import SpecialTokens
from lit_rlhf.text.template import Note
from lit_rlhf.text.transcripts import transcript_for
from lit_rlhf.text.world import Grade
from lit_rlhf.training.all_processes import distributed_map, gather_step, global_batch_index
from lit_rlhf.training.batches import largest, seeded
from lit_rlhf.training.callbacks import inner_bar
from lit_rlhf.training.dry_run import Meter


class BatchAnswers(NamedTuple):
    """Answers of all models to the prompts of one batch."""

    batch: PromptBatch
    answers: dict[str, Answers]
    greedy: dict[str, Answers]
    candidates: Answers


@checked
class EvaluateModule(LightningModule):
    """Samples answers of several models and compares them.

    Processes share out the batches and know all that was written; the first one has it ranked.

    Args:
        policies: name -> (model, tokenizer), from weakest to strongest; "sft" is what others are compared with.
        reward_model: grades where no gold judge does, and picks the best of n; one that reads the prompts' tokens, or
            what scores answers by their texts; None: not done.
        tokenizer: of the prompts' tokens, which the reward model reads; None: that of "sft", else of the first model.
        gold_judge: grades the answers, and knows the right ones; None: there is none.
        annotator: ranks the answers of all models to a prompt together; None: nobody does.
        judge: who decides which answer is better; None: the annotator, else the gold judge, else the reward model.
        samples: answers per prompt at ``sampling.temperature``.
        best_of: n of the best-of-n from the SFT model; 0: not done.
        prompted_base: let "base" compete a second time, behind a transcript that makes it a weak assistant.
        anchor_rating: Elo points of the SFT model (of the first one where there is none).
        text_row_length: tokens of a row of held-out text, for the perplexity.
        share_prompts: read a prompt once for all its answers, where attention can be told so.
        sampling: how answers are drawn.
        engine: what draws them; None: :class:`FastEngine`.
        benchmark: tasks that each model is asked by itself; None: none.
        documents: text that no model was trained on, for the perplexity; none: it is not measured.
        special_tokens: what their names mean in the prompts; see :class:`lit_rlhf.stages.prompts.PromptDataModule`.
        note: says what a person should know, each line once.
        seed: of the sampling.
    """

    def __init__(
        self,
        policies: Mapping[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]],
        reward_model: RewardModel | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        gold_judge: Judge | None = None,
        annotator: Annotator | None = None,
        judge: JudgeName | None = None,
        samples: Annotated[int, Field(ge=1)] = 4,
        best_of: Annotated[int, Field(ge=0)] = 8,
        prompted_base: bool = True,
        anchor_rating: float = 1000.0,
        text_row_length: Annotated[int, Field(ge=2)] = 96,
        share_prompts: bool = True,
        sampling: Sampling = Sampling(),
        engine: Engine | None = None,
        benchmark: Benchmark | None = None,
        documents: Sequence[str] = (),
        special_tokens: SpecialTokens = "plain",
        note: Note = say_once,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.policies = torch.nn.ModuleDict({name: freeze(policy) for name, (policy, _) in policies.items()})
        self.tokenizers = {name: tokenizer for name, (_, tokenizer) in policies.items()}
        self.reward_model = frozen(reward_model)
        self.tokenizer = tokenizer or self.tokenizers.get("sft") or next(iter(self.tokenizers.values()))
        self.gold_judge, self.annotator, self.judge = gold_judge, annotator, judge
        self.documents, self.special_tokens, self.note = documents, special_tokens, note
        self.samples, self.best_of, self.seed = samples, best_of, seed
        self.anchor_rating, self.text_row_length, self.share_prompts = anchor_rating, text_row_length, share_prompts
        self.sampling, self.engine, self.benchmark = sampling, engine or FastEngine(), benchmark
        names = list(policies)
        if prompted_base and "base" in names:
            names.insert(names.index("base") + 1, PROMPTED)
        self.answers: dict[str, Answers] = {name: Answers() for name in names}
        self.greedy: dict[str, Answers] = {name: Answers() for name in names}
        self.candidates = Answers()  # best_of answers of the SFT model to each prompt
        self.best = Answers()  # of these the one that the reward model likes best
        self.prompts: list[dict[str, Any]] = []
        self.texts: dict[str, dict[str, Any]] = {}  # of each model on held-out text
        self.benchmarked: dict[str, dict[str, dict[str, float]]] = {}  # model -> task -> metrics
        self._knows_tokens: set[str] = set()  # models whose tokens are those of the prompts
        self._talks_like_sft: set[str] = set()  # and with SFT's tokens and turns: both know how likely an answer is

    def configure_callbacks(self) -> list[Callback]:
        return [FitContext(self.sampling.max_new_tokens)]

    def on_test_start(self) -> None:
        if self.benchmark is not None and self._trainer is not None and self._trainer.world_size > 1:
            raise UserError("benchmark (evaluate): tasks are asked in one process; set devices=1 (evaluate.trainer)")
        there = {"gold": self.gold_judge is not None, "reward_model": self.reward_model, "annotator": self.annotator}
        if self.judge is not None and not there[self.judge]:
            known = ", ".join(name for name, here in there.items() if here) or "nobody"
            raise UserError(
                f"judge={self.judge!r} (evaluate.module.judge): there is none in this evaluation; there is {known}"
            )
        asked_in = self.tokenizer.get_vocab()
        vocabularies = {name: self.tokenizers[name].get_vocab() for name in self.policies}
        self._knows_tokens = {name for name, vocabulary in vocabularies.items() if vocabulary == asked_in}
        if "sft" in self.policies:
            template = self.tokenizers["sft"].chat_template
            self._talks_like_sft = {
                name
                for name, vocabulary in vocabularies.items()
                if vocabulary == vocabularies["sft"] and self.tokenizers[name].chat_template == template
            }
        if isinstance(self.annotator, Questioning):
            answers = self.samples * len(self.answers) + (self.best_of > 0)
            self.note(
                f"{name_of(self.annotator)} is asked up to {self.annotator.questions(answers):,} questions per prompt, "
                f"about {answers} answers; samples=1, best_of=0, prompted_base=False (evaluate.module) make them fewer"
            )
        if PROMPTED in self.answers:
            # Without examples: how far it comes by knowing whose turn it is.
            self.transcript = replace(transcript_for(self.tokenizers["base"]), examples=())
            self.tokenizers[PROMPTED] = self.transcript.prompting(self.tokenizers["base"])
            self.print(f'evaluate: "{PROMPTED}" is the base model behind {self.transcript}')

    @property
    def decides(self) -> JudgeName:
        """The name of the judge that decides which answer is better."""
        if self.judge is not None:
            return self.judge
        graded = any(answers.grades for answers in self.answers.values())
        return "annotator" if self.annotator is not None else "gold" if graded else "reward_model"

    def dry_run(self, meter: Meter, data: LightningDataModule) -> None:
        """Answers of the largest model to one batch, and their scores, by models without values."""
        self.on_test_start()
        name = max(list(self.policies)[::-1], key=lambda name: self.policies[name].num_parameters())
        most, batch = max(self.samples, self.best_of), largest(data.test_dataloader())
        sample(self.engine, self.policies[name], self.tokenizers[name], batch.tokens * most, self.sampling)
        few = PromptBatch(*(column[:4] for column in batch))  # scores are read in batches, of which one is like another
        self._answer(name, few, most, self.sampling, (0,), Answers())

    # ---------------------------------------------------------------- sampling

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """All models answer one batch of prompts."""
        own = self._written(batch, global_batch_index(self.trainer, batch_idx))
        for written in gather_step(self.trainer, own, batch_idx):
            self._take(written)

    def _written(self, batch: PromptBatch, number: int) -> BatchAnswers:
        """What the models answer to the batch of that number."""
        written = BatchAnswers(batch, *({name: Answers() for name in self.answers} for _ in range(2)), Answers())
        # Places are those of the policies as they were given: one more does not change what the others draw.
        places = {name: place for place, name in enumerate(self.policies)}
        for name in inner_bar(self.trainer, list(self.answers), "evaluate: models"):
            place = (number, places[name]) if name in places else (number, places["base"], 2)
            self._answer(name, batch, self.samples, self.sampling, place, written.answers[name])
            self._answer(name, batch, 1, self.sampling.greedy(), (*place, 1), written.greedy[name])
        if self.best_of and self.reward_model is not None and "sft" in self.policies:
            self._answer("sft", batch, self.best_of, self.sampling, (number, -1), written.candidates)
        return written

    def _take(self, written: BatchAnswers) -> None:
        batch = written.batch
        self.prompts += [{"prompt": m, "kind": k} for m, k in zip(batch.messages, batch.kinds)]
        for name in self.answers:
            self.answers[name].add(written.answers[name])
            self.greedy[name].add(written.greedy[name])
        self.candidates.add(written.candidates)
        if written.candidates.texts:
            self._pick(len(batch.messages))
        if self.annotator is not None and self.trainer.is_global_zero:
            self._rank(batch)

    def _answer(
        self, name: str, batch: PromptBatch, n: int, sampling: Sampling, place: tuple[int, ...], into: Answers
    ) -> None:
        policy, tokenizer = self.policies["base" if name == PROMPTED else name], self.tokenizers[name]
        room = context_length(policy) - sampling.max_new_tokens
        # Each model is prompted by its own template: a base model only sees the text and goes on with it.
        tools, kind = [record.get("tools") for record in batch.records], self.special_tokens
        prompts = encode_prompts(tokenizer, batch.messages, tools, special_tokens=kind, note=self.note)
        asked = [tokens for tokens in last_tokens(name, prompts, room, self.note) for _ in range(n)]
        answers = sample(self.engine, policy, tokenizer, asked, sampling, seeded(self.seed, *place))
        texts, finished = answers.texts(tokenizer), answers.finished.tolist()
        if name == PROMPTED:  # it goes on with the user's next turn where an assistant ends
            cut = [self.transcript.answer(text) for text in texts]
            finished = [f or short != text for f, short, text in zip(finished, cut, texts)]
            texts = cut
        into.texts += _grouped(texts, n)
        into.tokens += _grouped(answers.lengths.tolist(), n)
        if not answers.entropy.isnan().any():  # an engine may not know it
            into.entropy += _grouped(masked_sum(answers.entropy, answers.mask, dim=-1).tolist(), n)
        if self.gold_judge is not None:
            messages = [m for m in batch.messages for _ in range(n)]
            grades = grades_of(self.gold_judge, messages, texts, finished)
            into.grades += _grouped([grade_figures(g) for g in grades], n)
        if self.reward_model is not None:
            into.scores += _grouped(self._scores(name, repeated(batch, n), answers, texts, finished).tolist(), n)
        if name != "sft" and name in self._talks_like_sft and sampling.temperature > 0:
            into.kl += _grouped(self._kl(asked, answers).tolist(), n)

    def _scores(
        self, name: str, asked: PromptBatch, answers: Responses, texts: list[str], finished: list[bool]
    ) -> Tensor:
        """Scores (B,) of an answer to each prompt, behind it as the reward model knows it; NaN: it says nothing."""
        packed: Iterable[Packed] = ()
        if isinstance(self.reward_model, AnyRewardModel):
            responses = answers.token_lists()
            if name not in self._knows_tokens:  # in tokens that it does not know, or cut
                tools = [record.get("tools") for record in asked.records]
                responses = encode_responses(self.tokenizer, asked.messages, texts, tools, note=self.note)
            packed = self._packed(asked.tokens, responses, self.reward_model.config.pad_token_id, self.reward_model)
        record = record_of(asked, finished)
        return scores_by(self.reward_model, packed, asked.messages, texts, record, scale=True)

    def _kl(self, prompts: list[list[int]], answers: Responses) -> Tensor:
        sft, pad_id = self.policies["sft"], self.tokenizers["sft"].pad_token_id
        packed = self._packed(prompts, answers.token_lists(), pad_id, sft)
        ref = stacked([response_logprobs(sft, batch, self.sampling.temperature) for batch in packed])
        return sequence_kl(answers.logprobs, ref, answers.mask)

    def _packed(
        self, prompts: list[list[int]], responses: list[list[int]], pad_id: int, reader: nn.Module
    ) -> list[Packed]:
        """Batches of as many tokens as ``reader`` may be given at once; the samples of a prompt share it."""
        sequences = [[*prompt, *response] for prompt, response in zip(prompts, responses)]
        masks = [[False] * len(prompt) + [True] * len(response) for prompt, response in zip(prompts, responses)]
        batching = Batching(pad_id, self.device, share_prompts=self.share_prompts and shares_prompts(reader))
        return batching.batches(sequences, masks, tokens_at_once(reader, learning=False))

    def _pick(self, count: int) -> None:
        """The best of n for the last ``count`` prompts."""
        for i in range(len(self.candidates.texts) - count, len(self.candidates.texts)):
            scores = self.candidates.scores[i]
            best = max(range(len(scores)), key=lambda j: -math.inf if math.isnan(scores[j]) else scores[j])
            self.best.texts.append([self.candidates.texts[i][best]])
            self.best.scores.append([scores[best]])
            if self.candidates.grades:
                self.best.grades.append([self.candidates.grades[i][best]])

    def _rank(self, batch: PromptBatch) -> None:
        """The annotator ranks the answers of all contestants to a prompt together."""
        contestants = list(self.comparison().contestants.values())
        first = len(self.prompts) - len(batch.messages)
        together = [[text for c in contestants for text in c.texts[i]] for i in range(first, len(self.prompts))]
        tools = [record.get("tools") for record in batch.records]
        beside = with_tools(self.annotator, tools, self.note)
        for i, ranks in enumerate(self.annotator(batch.messages, together, **beside), start=first):
            left = iter(ranks)
            for contestant in contestants:
                contestant.ranks.append([next(left) for _ in contestant.texts[i]])

    def on_test_epoch_end(self) -> None:
        """Held-out text is read; win rates go to the loggers too, as ``evaluate/<stronger>_vs_<weaker>``."""
        if self.documents:
            read, length = partial(distributed_map, self.trainer), self.text_row_length
            for name, policy in inner_bar(self.trainer, list(self.policies.items()), "evaluate: text"):
                self.texts[name] = text_figures(policy, self.tokenizers[name], self.documents, length, read)
        if self.benchmark is not None:
            for name, policy in inner_bar(self.trainer, list(self.policies.items()), "evaluate: benchmark"):
                self.benchmarked[name] = self.benchmark(policy, self.tokenizers[name])
        for name, tasks in self.benchmarked.items():
            for task, metrics in tasks.items():
                shown = ", ".join(f"{k} {v:.3g}" for k, v in metrics.items() if not k.endswith("_stderr"))
                say(f"evaluate: {name}: {task}: {shown}")
        self.log_dict({f"evaluate/{name}": rate["mean"] for name, rate in self.comparison().win_rates().items()})

    def comparison(self) -> Comparison:
        """Comparison of all answers so far."""
        return Comparison(self.prompts, self.answers, self.greedy, self.best, self.decides, self.texts)

    def figures(self) -> dict[str, Any]:
        """Headline figures: models, win rates and ratings with 95% intervals, by kind of prompt."""
        names = {
            "annotator": name_of(self.annotator),
            "gold": "gold",
            "reward_model": None if self.reward_model is None else f"{title_of(self.reward_model)} (proxy)",
        }
        found = self.comparison().figures(self.anchor_rating, self.best_of)
        of_judging = self.annotator.figures() if isinstance(self.annotator, Reporting) else {}
        for name, tasks in self.benchmarked.items():
            found["models"][name]["benchmark"] = tasks
        return {"judge": names[self.decides], "prompts": len(self.prompts), **of_judging, **found}

    def export(self, folder: Path) -> None:
        """Write ``samples.jsonl``: every prompt with each model's greedy answer and its first samples.

        ``candidates`` are what the best of n is chosen from: scores and gold grades of n answers by the SFT model."""
        rows = []
        for i, prompt in enumerate(self.prompts):
            row: dict[str, Any] = dict(prompt, models={})
            for name, answers in self.answers.items():
                greedy = self.greedy[name]
                row["models"][name] = {
                    "greedy": greedy.texts[i][0],
                    "samples": answers.texts[i],
                    "scores": _told(answers.scores[i]) if answers.scores else None,
                    "grades": answers.grades[i] if answers.grades else None,
                    "ranks": answers.ranks[i] if answers.ranks else None,
                    "greedy_grade": greedy.grades[i][0] if greedy.grades else None,
                }
            if self.candidates.texts:
                gold = [grade["gold"] for grade in self.candidates.grades[i]] if self.candidates.grades else None
                row["candidates"] = {"scores": _told(self.candidates.scores[i]), "gold": gold}
            rows.append(row)
        write_jsonl(folder / "samples.jsonl", rows)


def grade_figures(grade: Grade) -> dict[str, float]:
    """A grade as plain numbers."""
    return {key: float(getattr(grade, key)) for key in ("gold", "correct", "polite", "right")}


def _told(scores: Sequence[float]) -> list[float | None]:
    """Scores as JSON has them, None where nothing was said."""
    return [None if math.isnan(score) else score for score in scores]


def _grouped(items: Sequence[Any], n: int) -> list[list[Any]]:
    return [list(items[i : i + n]) for i in range(0, len(items), n)]
