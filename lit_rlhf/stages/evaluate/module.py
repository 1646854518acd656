"""Evaluation: base, SFT, PPO and DPO answer the same held-out prompts; who wins, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import torch
from lightning import LightningModule
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.functional import WinRate, best_of_n, masked_sum, sequence_kl, win_rate
from lit_rlhf.models import (
    Responses,
    Sampling,
    answer,
    context_length,
    freeze,
    packed_scores,
    score_shift,
    score_std,
)
from lit_rlhf.stages.ppo.rollout import pack_on, response_logprobs
from lit_rlhf.stages.prompts import PromptBatch
from lit_rlhf.text.chat import encode_prompts
from lit_rlhf.text.records import write_jsonl
from lit_rlhf.training import seeded


@dataclass
class Answers:
    """What one model wrote; P prompts, n samples each."""

    texts: list[list[str]] = field(default_factory=list)  # (P, n)
    scores: list[list[float]] = field(default_factory=list)  # (P, n), by the reward model, in SFT standard deviations
    grades: list[list[dict[str, Any]]] = field(default_factory=list)  # (P, n), by the gold judge
    entropy: list[float] = field(default_factory=list)  # nats, summed over an answer's tokens
    tokens: list[int] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)  # nats an answer, against SFT


class EvaluateModule(LightningModule):
    """Samples answers of several models and compares them.

    Args:
        policies: name -> (model, tokenizer), from weakest to strongest; "sft" is what others are compared with.
        reward_model: grades where no gold judge does, and picks the best of n; None: not done.
        samples: answers a prompt at ``sampling.temperature``.
        best_of: n of the best-of-n from the SFT model; 0: not done.
        sampling: how answers are drawn.
        seed: of the sampling.
    """

    def __init__(
        self,
        policies: Mapping[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]],
        reward_model: PreTrainedModel | None = None,
        *,
        samples: Annotated[int, Field(ge=1)] = 4,
        best_of: Annotated[int, Field(ge=0)] = 8,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.policies = torch.nn.ModuleDict({name: freeze(policy) for name, (policy, _) in policies.items()})
        self.tokenizers = {name: tokenizer for name, (_, tokenizer) in policies.items()}
        self.reward_model = None if reward_model is None else freeze(reward_model)
        self.samples, self.best_of, self.seed = samples, best_of, seed
        self.sampling = sampling or Sampling()
        self.answers: dict[str, Answers] = {name: Answers() for name in policies}
        self.greedy: dict[str, Answers] = {name: Answers() for name in policies}
        self.candidates = Answers()  # best_of answers of the SFT model to each prompt
        self.prompts: list[dict[str, Any]] = []

    # ---------------------------------------------------------------- sampling

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """All models answer one batch of prompts."""
        self.prompts += [{"prompt": m, "kind": k} for m, k in zip(batch.messages, batch.kinds)]
        for place, name in enumerate(self.policies):
            self._answer(name, batch, self.samples, self.sampling, (batch_idx, place), self.answers[name])
            self._answer(name, batch, 1, self.sampling.greedy(), (batch_idx, place, 1), self.greedy[name])
        if self.best_of and self.reward_model is not None and "sft" in self.policies:
            self._answer("sft", batch, self.best_of, self.sampling, (batch_idx, -1), self.candidates)

    def _answer(
        self, name: str, batch: PromptBatch, n: int, sampling: Sampling, place: tuple[int, ...], into: Answers
    ) -> None:
        policy, tokenizer = self.policies[name], self.tokenizers[name]
        # Each model is prompted by its own template: a base model only sees the text and goes on with it.
        prompts = encode_prompts(tokenizer, batch.messages)
        room = context_length(policy) - sampling.max_new_tokens
        repeated = [tokens[-room:] for tokens in prompts for _ in range(n)]
        answers = answer(policy, tokenizer, repeated, sampling, seeded(self.seed, *place, device=self.device))
        texts = answers.texts(tokenizer)
        into.texts += _grouped(texts, n)
        into.tokens += answers.lengths.tolist()
        into.entropy += masked_sum(answers.entropy, answers.mask, dim=-1).tolist()
        finished = answers.finished.tolist()
        judge = getattr(self.trainer.datamodule, "judge", None)
        if judge is not None:
            messages = [m for m in batch.messages for _ in range(n)]
            grades = [judge.grade(m, t, not f) for m, t, f in zip(messages, texts, finished)]
            into.grades += _grouped([grade_figures(g) for g in grades], n)
        if self.reward_model is not None:
            into.scores += _grouped(self._scores(batch, answers, n).tolist(), n)
        if name != "sft" and "sft" in self.policies and name != "base" and sampling.temperature > 0:
            into.kl += self._kl(repeated, answers).tolist()

    def _scores(self, batch: PromptBatch, answers: Responses, n: int) -> Tensor:
        """Scores (B,) of the answers behind the prompts as the reward model knows them."""
        prompts = [tokens for tokens in batch.tokens for _ in range(n)]
        sequences = [p + r for p, r in zip(prompts, answers.token_lists())]
        packed = pack_on(sequences, self.reward_model.config.pad_token_id, self.device, answers.lengths)
        return (packed_scores(self.reward_model, packed) + score_shift(self.reward_model)) / score_std(
            self.reward_model
        )

    def _kl(self, prompts: list[list[int]], answers: Responses) -> Tensor:
        sequences = [p + r for p, r in zip(prompts, answers.token_lists())]
        packed = pack_on(sequences, self.tokenizers["sft"].pad_token_id, self.device, answers.lengths)
        ref = response_logprobs(self.policies["sft"], packed, answers.lengths, self.sampling.temperature)
        return sequence_kl(answers.logprobs, ref, answers.mask)

    def on_test_epoch_end(self) -> None:
        """Win rates go to the loggers too, as ``evaluate/<stronger>_vs_<weaker>``."""
        rates = self.figures()["win_rate"]
        self.log_dict({f"evaluate/{name}": rate["mean"] for name, rate in rates.items()})

    # --------------------------------------------------------------- comparing

    def worth(self, answers: Answers) -> Tensor:
        """What the answers are compared by, (P, n): gold grades, or the reward model's scores without them."""
        if answers.grades:
            return torch.tensor([[g["gold"] for g in row] for row in answers.grades], dtype=torch.float64)
        if answers.scores:
            return torch.tensor(answers.scores, dtype=torch.float64)
        return torch.empty(0, 0)

    def figures(self) -> dict[str, Any]:
        """Headline figures: models, win rates with 95% intervals, by kind of prompt."""
        names = list(self.policies)
        result: dict[str, Any] = {
            "judge": "gold" if self.answers[names[0]].grades else "reward model (proxy)",
            "prompts": len(self.prompts),
            "models": {name: self._model_figures(name) for name in names},
            "win_rate": {},
        }
        worths = {name: self.worth(self.answers[name]) for name in names}
        if all(w.numel() for w in worths.values()):
            for weaker, stronger in combinations(names, 2):
                result["win_rate"][f"{stronger}_vs_{weaker}"] = _rate(win_rate(worths[stronger], worths[weaker]))
            if self.candidates.texts:
                best = best_of_n(self.worth(self.candidates), torch.tensor(self.candidates.scores))[:, None]
                result["best_of_n"] = self._best_of_figures(best, worths)
        return result

    def _model_figures(self, name: str) -> dict[str, Any]:
        answers, greedy = self.answers[name], self.greedy[name]
        graded = bool(answers.grades)
        flat = [g for row in answers.grades for g in row]
        return {
            **{
                key: _mean([g[key] for g in flat]) if graded else None for key in ("gold", "correct", "polite", "right")
            },
            "words": _mean([len(text.split()) for row in answers.texts for text in row]),
            "entropy": sum(answers.entropy) / max(sum(answers.tokens), 1),
            "score": _mean([s for row in answers.scores for s in row]) if answers.scores else None,
            "kl": _mean(answers.kl) if answers.kl else (0.0 if name == "sft" else None),
            "greedy_right": _mean([row[0]["right"] for row in greedy.grades]) if graded else None,
            "greedy_gold": _mean([row[0]["gold"] for row in greedy.grades]) if graded else None,
            "by_kind": self._by_kind(answers) if graded else {},
        }

    def _by_kind(self, answers: Answers) -> dict[str, dict[str, float]]:
        kinds: dict[str, list[dict[str, Any]]] = {}
        for prompt, row in zip(self.prompts, answers.grades):
            kinds.setdefault(prompt["kind"], []).extend(row)
        return {
            kind: {key: _mean([g[key] for g in grades]) for key in ("gold", "correct", "right")}
            for kind, grades in sorted(kinds.items())
        }

    def _best_of_figures(self, best: Tensor, worths: dict[str, Tensor]) -> dict[str, Any]:
        """The SFT model's best of n answers by the reward model: what PPO has to be held against."""
        picked = [max(range(len(row)), key=row.__getitem__) for row in self.candidates.scores]
        grades = [row[i] for row, i in zip(self.candidates.grades, picked)]
        return {
            "n": self.best_of,
            "gold": _mean([g["gold"] for g in grades]) if grades else None,
            "correct": _mean([g["correct"] for g in grades]) if grades else None,
            "right": _mean([g["right"] for g in grades]) if grades else None,
            "win_rate": {f"best_of_n_vs_{name}": _rate(win_rate(best, worth)) for name, worth in worths.items()},
        }

    def export(self, folder: Path) -> None:
        """Write ``samples.jsonl``: every prompt with each model's greedy answer and its first samples.

        ``candidates`` are what the best of n is chosen from: scores and gold grades of n answers by the SFT model."""
        rows = []
        for i, prompt in enumerate(self.prompts):
            row: dict[str, Any] = dict(prompt, models={})
            for name in self.policies:
                answers, greedy = self.answers[name], self.greedy[name]
                row["models"][name] = {
                    "greedy": greedy.texts[i][0],
                    "samples": answers.texts[i],
                    "scores": answers.scores[i] if answers.scores else None,
                    "grades": answers.grades[i] if answers.grades else None,
                    "greedy_grade": greedy.grades[i][0] if greedy.grades else None,
                }
            if self.candidates.texts:
                gold = [grade["gold"] for grade in self.candidates.grades[i]] if self.candidates.grades else None
                row["candidates"] = {"scores": self.candidates.scores[i], "gold": gold}
            rows.append(row)
        write_jsonl(folder / "samples.jsonl", rows)


def grade_figures(grade: Any) -> dict[str, Any]:
    """A grade as plain numbers."""
    return {
        "gold": float(grade.gold),
        "correct": float(grade.correct),
        "polite": float(grade.polite),
        "right": float(grade.right),
    }


def _grouped(items: list[Any], n: int) -> list[list[Any]]:
    return [items[i : i + n] for i in range(0, len(items), n)]


def _mean(values: list[Any]) -> float:
    return sum(values) / max(len(values), 1)


def _rate(rate: WinRate) -> dict[str, Any]:
    return dict(rate._asdict())
