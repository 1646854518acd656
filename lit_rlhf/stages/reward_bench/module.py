"""How often a reward model scores the chosen answer highest."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import LightningModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.arguments import checked
from lit_rlhf.errors import UserError, say_once
from lit_rlhf.functional import wilson_interval
from lit_rlhf.models.heads import AnyRewardModel, score_answers
from lit_rlhf.models.policy import context_length
from lit_rlhf.stages.answer_scores import RewardModel, asked, frozen
from lit_rlhf.stages.reward_bench.data import BenchQuestion
from lit_rlhf.text.chat import encode_prompts, encode_responses
from lit_rlhf.text.records import Message, Messages, text_of, write_jsonl
from lit_rlhf.text.special_tokens import SpecialTokens
from lit_rlhf.text.template import Note
from lit_rlhf.text.template_form import Tools
from lit_rlhf.training.all_processes import gather_step, global_batch_index, interleaved
from lit_rlhf.training.batches import seeded


class Scored(NamedTuple):
    """A question with the scores of its answers."""

    question: BenchQuestion
    scores: list[float | None]  # None: nothing was said of an answer
    cut: int | None = 0  # answers that did not fit into the context with their prompt; None: the scorer says so itself

    @property
    def right(self) -> float | None:
        """1 where a chosen answer has the highest score, 0 where a rejected one has, 0.5 where both do; None where an
        answer has none."""
        if None in self.scores:
            return None
        best = {rank == 1 for rank, s in zip(self.question.ranking.ranks, self.scores) if s == max(self.scores)}
        return 0.5 if len(best) == 2 else float(True in best)


@checked
class RewardBenchModule(LightningModule):
    """Scores the answers of a benchmark of reward models (RewardBench, arXiv:2403.13787).

    Args:
        reward_model: a model with a scalar head, or whatever scores answers by their texts.
        tokenizer: of a model with a scalar head; others have their own, or none.
        special_tokens: what their names mean in the questions; see :class:`RewardBenchDataModule`.
        seed: of the order in which a question's answers are scored, so that no place is the right one.
        note: says what a person should know, each line once.
    """

    def __init__(
        self,
        reward_model: RewardModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        special_tokens: SpecialTokens = "plain",
        seed: int = 0,
        note: Note = say_once,
    ) -> None:
        super().__init__()
        headless = isinstance(reward_model, PreTrainedModel) and not hasattr(reward_model, "score")
        alone = isinstance(reward_model, AnyRewardModel) and tokenizer is None
        if headless or alone or not callable(reward_model) or isinstance(reward_model, PreTrainedTokenizerBase):
            raise UserError(
                f"RewardBenchModule(reward_model={type(reward_model).__name__}(...)): a model with a scalar head and "
                "its tokenizer was expected, or what scores answers by their texts"
            )
        self.reward_model, self.tokenizer, self.seed, self.note = frozen(reward_model), tokenizer, seed, note
        self.special_tokens = special_tokens
        self.scored: list[Scored] = []

    def test_step(self, batch: list[BenchQuestion], batch_idx: int) -> None:
        """Score the answers to one batch of questions."""
        found = self._score(batch, global_batch_index(self.trainer, batch_idx))
        self.scored += interleaved(gather_step(self.trainer, found, batch_idx))

    def _score(self, batch: list[BenchQuestion], number: int) -> list[Scored]:
        rankings = [question.ranking for question in batch]
        owners = [i for i, ranking in enumerate(rankings) for _ in ranking.responses]
        turns = [turn for ranking in rankings for turn in ranking.turns]
        order = torch.randperm(len(turns), generator=seeded(self.seed, number)).tolist()
        prompts, answers = [rankings[owners[i]].prompt for i in order], [turns[i] for i in order]
        tools = [rankings[owners[i]].tools for i in order]
        by_question: list[dict[int, float | None]] = [{} for _ in batch]
        scores, too_long = self._scores(prompts, answers, tools)
        for place, score in zip(order, scores):
            by_question[owners[place]][place] = score
        cut = Counter(owners[place] for place, long in zip(order, too_long or ()) if long)
        counts = [None if too_long is None else cut[i] for i in range(len(batch))]
        return [Scored(q, [s[i] for i in sorted(s)], n) for q, s, n in zip(batch, by_question, counts)]

    def _scores(
        self, prompts: list[Messages], answers: list[str | Message], tools: list[Tools]
    ) -> tuple[list[float | None], list[bool] | None]:
        """(scores of answers, which of them did not fit into the context with their prompts; None: not known here)."""
        if not isinstance(self.reward_model, AnyRewardModel):  # it says itself what it cuts
            texts = [answer if isinstance(answer, str) else text_of(answer) for answer in answers]
            return asked(self.reward_model, prompts, texts, {"tools": tools}), None
        kind, given = self.special_tokens, (self.tokenizer, prompts, answers)
        scores = score_answers(self.reward_model, *given, tools=tools, special_tokens=kind).tolist()
        before = encode_prompts(self.tokenizer, prompts, tools, special_tokens=kind)
        pairs = zip(before, encode_responses(*given, tools, special_tokens=kind))
        room = context_length(self.reward_model)
        return scores, [len(prompt) + len(answer) > room for prompt, answer in pairs]

    def on_test_epoch_end(self) -> None:
        """Accuracies are printed, and go to the loggers as ``reward_bench/accuracy`` and ``reward_bench/<subset>``."""
        figures = self.figures()
        if figures["cut"]:
            room = context_length(self.reward_model)
            self.note(f"{figures['cut']} answers do not fit into the context of {room} tokens; their ends were read")
        if incomplete := figures["incomplete"]:
            self.note(f"{incomplete} questions are left out: nothing was said of one of their answers, or more")
        for name, row in figures["subsets"].items():
            of = f"{row['accuracy']:.1%} of {row['n']} (95% interval {row['low']:.1%} to {row['high']:.1%})"
            self.print(f"reward_bench: {name}: {of}")
        subsets = {f"reward_bench/{name}": row["accuracy"] for name, row in figures["subsets"].items()}
        self.log_dict({"reward_bench/accuracy": figures["accuracy"], **subsets})

    def figures(self) -> dict[str, Any]:
        """Headline figures: accuracy over all questions, over subsets, and of each subset with its 95% interval."""
        subsets: dict[str, list[float]] = {}
        known = [(each.question.subset, each.right) for each in self.scored if each.right is not None]
        if not known:
            raise UserError(f"none of the {len(self.scored)} questions has a score for each of its answers")
        for subset, right in known:
            subsets.setdefault(subset, []).append(right)
        rows = {}
        for name, each_right in sorted(subsets.items()):
            count, total = len(each_right), sum(each_right)
            low, high = wilson_interval(total, count)
            rows[name] = {"accuracy": total / count, "low": low, "high": high, "n": count}
        return {
            "accuracy": sum(right for _, right in known) / len(known),
            "subset_mean": sum(row["accuracy"] for row in rows.values()) / len(rows),
            "questions": len(known),
            "incomplete": len(self.scored) - len(known),
            "tied": sum(right == 0.5 for _, right in known),
            "cut": None
            if any(each.cut is None for each in self.scored)
            else sum(each.cut or 0 for each in self.scored),
            "subsets": rows,
        }

    def export(self, folder: Path) -> None:
        """Write ``samples.jsonl``: every question with the scores of its answers."""
        rows = [
            {
                "prompt": each.question.ranking.prompt,
                "subset": each.question.subset,
                "responses": each.question.ranking.responses,
                "ranks": each.question.ranking.ranks,
                "scores": each.scores,
            }
            for each in self.scored
        ]
        write_jsonl(folder / "samples.jsonl", rows)
