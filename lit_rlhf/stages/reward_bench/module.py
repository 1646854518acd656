"""How often a reward model scores the chosen answer highest."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import LightningModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.arguments import checked
from lit_rlhf.errors import say_once
from lit_rlhf.functional import wilson_interval
from lit_rlhf.models.heads import score_answers
from lit_rlhf.models.policy import context_length, freeze
from lit_rlhf.stages.reward_bench.data import Question
from lit_rlhf.text.chat import encode_prompts, encode_responses
from lit_rlhf.text.records import write_jsonl
from lit_rlhf.text.special_tokens import SpecialTokens
from lit_rlhf.text.template import Note
from lit_rlhf.training.all_processes import gather_step, global_batch_index, interleaved
from lit_rlhf.training.batches import seeded


class Scored(NamedTuple):
    """A question with the scores of its answers."""

    question: Question
    scores: list[float]
    cut: int  # answers that did not fit into the context with their prompt

    @property
    def right(self) -> float:
        """1 where a chosen answer has the highest score, 0 where a rejected one has, 0.5 where both do."""
        best = {rank == 1 for rank, s in zip(self.question.ranking.ranks, self.scores) if s == max(self.scores)}
        return 0.5 if len(best) == 2 else float(True in best)


@checked
class RewardBenchModule(LightningModule):
    """Scores the answers of a benchmark of reward models (RewardBench, arXiv:2403.13787).

    Args:
        reward_model: a model with a scalar head.
        tokenizer: its tokenizer.
        special_tokens: what their names mean in the questions; see :class:`RewardBenchDataModule`.
        seed: of the order in which a question's answers are scored, so that no place is the right one.
        note: says what a person should know, each line once.
    """

    def __init__(
        self,
        reward_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        special_tokens: SpecialTokens = "plain",
        seed: int = 0,
        note: Note = say_once,
    ) -> None:
        super().__init__()
        self.reward_model, self.tokenizer, self.seed, self.note = freeze(reward_model), tokenizer, seed, note
        self.special_tokens = special_tokens
        self.scored: list[Scored] = []

    def test_step(self, batch: list[Question], batch_idx: int) -> None:
        """Score the answers to one batch of questions."""
        found = self._score(batch, global_batch_index(self.trainer, batch_idx))
        self.scored += interleaved(gather_step(self.trainer, found, batch_idx))

    def _score(self, batch: list[Question], number: int) -> list[Scored]:
        rankings = [question.ranking for question in batch]
        owners = [i for i, ranking in enumerate(rankings) for _ in ranking.responses]
        turns = [turn for ranking in rankings for turn in ranking.turns]
        order = torch.randperm(len(turns), generator=seeded(self.seed, number)).tolist()
        prompts, answers = [rankings[owners[i]].prompt for i in order], [turns[i] for i in order]
        tools = [rankings[owners[i]].tools for i in order]
        kind = self.special_tokens
        asked = (self.tokenizer, prompts, answers)
        scores = score_answers(self.reward_model, *asked, tools=tools, special_tokens=kind).tolist()
        before = encode_prompts(self.tokenizer, prompts, tools, special_tokens=kind)
        pairs = zip(before, encode_responses(*asked, tools, special_tokens=kind))
        room = context_length(self.reward_model)
        by_question: list[dict[int, float]] = [{} for _ in batch]
        cut = [0] * len(batch)
        for place, score, (prompt, answer) in zip(order, scores, pairs):
            by_question[owners[place]][place] = score
            cut[owners[place]] += len(prompt) + len(answer) > room
        return [Scored(q, [s[i] for i in sorted(s)], n) for q, s, n in zip(batch, by_question, cut)]

    def on_test_epoch_end(self) -> None:
        """Accuracies are printed, and go to the loggers as ``reward_bench/accuracy`` and ``reward_bench/<subset>``."""
        figures = self.figures()
        if figures["cut"]:
            room = context_length(self.reward_model)
            self.note(f"{figures['cut']} answers do not fit into the context of {room} tokens; their ends were read")
        for name, row in figures["subsets"].items():
            of = f"{row['accuracy']:.1%} of {row['n']} (95% interval {row['low']:.1%} to {row['high']:.1%})"
            self.print(f"reward_bench: {name}: {of}")
        subsets = {f"reward_bench/{name}": row["accuracy"] for name, row in figures["subsets"].items()}
        self.log_dict({"reward_bench/accuracy": figures["accuracy"], **subsets})

    def figures(self) -> dict[str, Any]:
        """Headline figures: accuracy over all questions, over subsets, and of each subset with its 95% interval."""
        subsets: dict[str, list[float]] = {}
        for each in self.scored:
            subsets.setdefault(each.question.subset, []).append(each.right)
        rows = {}
        for name, right in sorted(subsets.items()):
            low, high = wilson_interval(sum(right), len(right))
            rows[name] = {"accuracy": sum(right) / len(right), "low": low, "high": high, "n": len(right)}
        return {
            "accuracy": sum(each.right for each in self.scored) / len(self.scored),
            "subset_mean": sum(row["accuracy"] for row in rows.values()) / len(rows),
            "questions": len(self.scored),
            "tied": sum(each.right == 0.5 for each in self.scored),
            "cut": sum(each.cut for each in self.scored),
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
