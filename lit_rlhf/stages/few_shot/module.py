"""Zero-, one- and few-shot evaluation: a task is told by examples in the prompt, and no weight changes (GPT-3)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from lightning import LightningModule
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.arguments import checked
from lit_rlhf.functional import wilson_interval
from lit_rlhf.models.policy import context_length, freeze
from lit_rlhf.models.responses import response_logprobs
from lit_rlhf.rollouts import FastEngine, Sampling, sample
from lit_rlhf.stages.few_shot.data import Shot, ShotBatch
from lit_rlhf.text.packing import pack
from lit_rlhf.text.records import write_jsonl
from lit_rlhf.training.all_processes import gather_step, interleaved

Normalize = Literal["sum", "token", "byte"]
WAYS: tuple[Normalize, ...] = ("sum", "token", "byte")


@checked
class FewShotModule(LightningModule):
    """Asks a language model tasks by prompt alone.

    A choice is told by the likelihood of each choice behind the prompt; an open answer is what the model writes up to
    the end of the line, always taking the most likely token, and has to be met word for word.

    Args:
        policy: the model; a base model will do.
        tokenizer: its tokenizer.
        normalize: what of a choice is compared: "sum" of its tokens' log-probs, or that sum divided by its tokens or by
            its bytes (UTF-8), so that a long choice is not at a disadvantage. All three are in the figures.
        max_new_tokens: of an open answer.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        normalize: Normalize = "token",
        max_new_tokens: Annotated[int, Field(ge=1)] = 32,
    ) -> None:
        super().__init__()
        self.policy, self.tokenizer, self.normalize = freeze(policy), tokenizer, normalize
        self.sampling = Sampling(max_new_tokens, temperature=0.0)
        # Number of examples -> for each task (in order) what it was answered in each way; None: it does not fit.
        self.answers: dict[int, list[dict[str, str] | None]] = {}
        # Number of examples -> for each task (in order) the task, and the text of its prompt.
        self.asked: dict[int, list[tuple[Shot, str]]] = {}

    def test_step(self, batch: ShotBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Answer one batch of tasks; those that do not fit into the model's context are left out, and counted."""
        room = context_length(self.policy)
        needed = [
            len(prompt) + (max(map(len, choices)) if choices else self.sampling.max_new_tokens)
            for prompt, choices in zip(batch.prompts, batch.choices)
        ]
        fitting = [i for i, tokens in enumerate(needed) if tokens <= room]
        chosen = ShotBatch(batch.shots, *([column[i] for i in fitting] for column in batch[1:]))
        told = iter(self._choose(chosen) if batch.tasks[0].choices else self._write(chosen)) if fitting else iter(())
        answers = [next(told) if i in set(fitting) else None for i in range(len(needed))]
        found = [*zip(batch.tasks, batch.texts, answers)]
        for each in interleaved(gather_step(self.trainer, found, batch_idx, dataloader_idx)):
            self.asked.setdefault(batch.shots, []).append(each[:2])
            self.answers.setdefault(batch.shots, []).append(each[2])

    def _choose(self, batch: ShotBatch) -> list[dict[str, str]]:
        """The likeliest choice of each task, in each way."""
        sequences = [[*p, *choice] for p, choices in zip(batch.prompts, batch.choices) for choice in choices]
        lengths = [len(choice) for choices in batch.choices for choice in choices]
        packed = pack(sequences, self.tokenizer.pad_token_id, lengths).to(self.device)
        sums = response_logprobs(self.policy, packed).sum(-1).tolist()
        told, at = [], 0
        for task in batch.tasks:
            mine = slice(at, at := at + len(task.choices))
            scores = choice_scores(sums[mine], lengths[mine], [len(c.encode()) for c in task.choices])
            told.append({way: task.choices[max(range(len(s)), key=s.__getitem__)] for way, s in scores.items()})
        return told

    def _write(self, batch: ShotBatch) -> list[dict[str, str]]:
        """What the model writes up to the end of the line."""
        responses = sample(FastEngine(), self.policy, self.tokenizer, batch.prompts, self.sampling)
        return [{"greedy": " ".join(text.split("\n")[0].split())} for text in responses.texts(self.tokenizer)]

    def on_test_epoch_end(self) -> None:
        """Accuracies go to the loggers too, as ``few_shot/accuracy_<k>``."""
        shots = self.figures()["shots"]
        self.log_dict({f"few_shot/accuracy_{k}": row["accuracy"] for k, row in shots.items() if row["n"]})
        if left_out := [f"{row['too_long']} behind {k}" for k, row in shots.items() if row["too_long"]]:
            where = f"the model's context ({context_length(self.policy)} tokens)"
            self.print(f"few_shot: tasks that do not fit into {where} are left out: {', '.join(left_out)} examples")

    def figures(self) -> dict[str, Any]:
        """Headline figures: accuracy for each number of examples, with its 95% interval and its n.

        ``accuracy`` is that of the largest number, ``k``, with which every task fits."""
        shots = {str(k): self._row(answers, self.tasks) for k, answers in sorted(self.answers.items())}
        whole = [k for k, row in shots.items() if row["too_long"] == 0]
        chosen = bool(self.tasks[0].choices)
        return {
            "task": "choice" if chosen else "exact match",
            "examples": len(self.tasks),
            "parameters": sum(p.numel() for p in self.policy.parameters()),
            "guessing": sum(1 / len(task.choices) for task in self.tasks if task.choices) / len(self.tasks),
            "normalize": self.normalize if chosen else "greedy",
            "k": int(whole[-1]) if whole else None,
            "accuracy": shots[whole[-1]]["accuracy"] if whole else None,
            "shots": shots,
        }

    @property
    def tasks(self) -> list[Shot]:
        """Every task once, in order."""
        return [task for task, _ in next(iter(self.asked.values()))]

    def _row(self, answers: list[dict[str, str] | None], tasks: list[Shot]) -> dict[str, Any]:
        asked = [(told, task) for told, task in zip(answers, tasks) if told is not None]
        ways = list(asked[0][0]) if asked else []
        right = {way: sum(told[way] in map(_plain, task.answers) for told, task in asked) for way in ways}
        n, way = len(asked), self.normalize if self.normalize in ways else "greedy"
        low, high = wilson_interval(right.get(way, 0), n)
        return {
            "accuracy": right[way] / n if n else None,
            "low": low if n else None,
            "high": high if n else None,
            "n": n,
            "too_long": len(answers) - n,
            "by": {way: count / n for way, count in right.items()},
        }

    def export(self, folder: Path) -> None:
        """Write ``samples.jsonl``: every task with its prompt and what was answered behind each number of examples."""
        prompts = self.asked[min(self.asked, key=lambda k: (k == 0 and len(self.asked) > 1, k))]
        rows = [
            {
                "question": task.question,
                "choices": list(task.choices),
                "right": list(task.answers),
                "told": {str(k): answers[i] for k, answers in sorted(self.answers.items())},
                "prompt": text,
            }
            for i, (task, text) in enumerate(prompts)
        ]
        write_jsonl(folder / "samples.jsonl", rows)


def choice_scores(sums: list[float], tokens: list[int], sizes: list[int]) -> dict[Normalize, list[float]]:
    """Scores of choices in each way of comparing, from summed log-probs (nats), lengths in tokens and in bytes."""
    divisors = {"sum": [1] * len(sums), "token": tokens, "byte": sizes}
    return {way: [total / by for total, by in zip(sums, divisors[way])] for way in WAYS}


def _plain(text: str) -> str:
    return " ".join(text.split())
