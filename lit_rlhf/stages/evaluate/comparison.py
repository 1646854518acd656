"""How models compare that have answered the same prompts: figures of each, win rates, ratings, changes."""

from __future__ import annotations

from itertools import combinations
from typing import Any, NamedTuple

from torch import Tensor

from lit_rlhf.functional import FEW, Estimate, elo, length_controlled_win_rate, ratings, tournament, win_rate
from lit_rlhf.stages.evaluate.answers import Answers, JudgeName, estimates, measures, worth

PROMPTED = "prompted"  # the base model behind a transcript


class Comparison(NamedTuple):
    """Answers of several models, and who decides which one is better."""

    prompts: list[dict[str, Any]]  # "prompt" (messages) and "kind" of each
    answers: dict[str, Answers]  # of each model, from weakest to strongest
    greedy: dict[str, Answers]  # one of each model to each prompt: always the most likely token
    best: Answers  # the best of n of the SFT model; empty where that was not done
    judge: JudgeName
    texts: dict[str, dict[str, Any]]  # figures of each model on held-out text

    @property
    def contestants(self) -> dict[str, Answers]:
        """All that compete: the models, and the best of n."""
        return {**self.answers, **({"best_of_n": self.best} if self.best.texts else {})}

    def figures(self, anchor_rating: float, best_of: int) -> dict[str, Any]:
        """Figures of all models; ``anchor_rating``: Elo points of the SFT model, ``best_of``: n of the best-of-n."""
        worths = self._worths()
        result: dict[str, Any] = {
            "models": {name: self._model_figures(name) for name in self.answers},
            "win_rate": self.win_rates(),
        }
        if worths and self.best.texts:
            result["best_of_n"] = self._best_of_figures(worths, best_of)
        if len(worths) > 1:
            result["ratings"] = self._ratings(worths, anchor_rating)
        if changes := self._changes():
            result["changes"] = changes
        return result

    def win_rates(self) -> dict[str, dict[str, Any]]:
        """``<stronger>_vs_<weaker>`` -> win rate, of every two models; empty where nobody judges."""
        worths = self._worths()
        models = [name for name in self.answers if name in worths]
        return {f"{b}_vs_{a}": self._rate(worths, b, a) for a, b in combinations(models, 2)}

    def _worths(self) -> dict[str, Tensor]:
        """What each contestant's answers are compared by; empty where nobody judges."""
        worths = {name: worth(answers, self.judge) for name, answers in self.contestants.items()}
        return worths if all(w.numel() for w in worths.values()) else {}

    def _rate(self, worths: dict[str, Tensor], ours: str, theirs: str) -> dict[str, Any]:
        texts = self.contestants[ours].texts, self.contestants[theirs].texts
        fair = length_controlled_win_rate(worths[ours], worths[theirs], texts)
        enough = fair.prompts >= FEW  # to tell what length does
        controlled = {"mean": fair.mean, "low": fair.low, "high": fair.high} if enough else None
        return {**win_rate(worths[ours], worths[theirs], texts)._asdict(), "length_controlled": controlled}

    def _ratings(self, worths: dict[str, Tensor], anchor_rating: float) -> dict[str, Any]:
        """Bradley-Terry ratings on Elo's scale of all contestants, each having met each on every prompt."""
        names = list(worths)
        anchor = names.index("sft") if "sft" in names else 0
        texts = [self.contestants[name].texts for name in names]
        fitted = ratings(tournament(list(worths.values()), texts), anchor)
        points = [elo(ends, anchor_rating).tolist() for ends in fitted]
        models = {n: dict(zip(("elo", "low", "high"), p)) for n, p in zip(names, zip(*points))}
        return {"anchor": names[anchor], "prompts": len(self.prompts), "models": models}

    def _model_figures(self, name: str) -> dict[str, Any]:
        answers = self.answers[name]
        found = estimates(answers)
        greedy = estimates(Answers(grades=self.greedy[name].grades))
        found |= {f"greedy_{key}": greedy[key] for key in ("right", "gold") if key in greedy}
        shown = ("gold", "correct", "polite", "right", "score", "kl", "greedy_right", "greedy_gold")
        figures: dict[str, Any] = dict.fromkeys(shown) | {key: estimate.value for key, estimate in found.items()}
        if name == "sft":
            figures["kl"] = 0.0
        interval = {key: _interval(estimate) for key, estimate in found.items()}
        if text := self.texts.get(name):
            figures["perplexity"], figures["text"] = text["perplexity"], text
            interval["perplexity"] = {"low": text["low"], "high": text["high"], "rows": text["rows"]}
        return figures | {
            "answers": sum(map(len, answers.texts)),
            "by_kind": self._by_kind(answers),
            "interval": interval,
        }

    def _by_kind(self, answers: Answers) -> dict[str, dict[str, float]]:
        kinds: dict[str, Answers] = {}
        for prompt, row in zip(self.prompts, answers.grades):
            kinds.setdefault(prompt["kind"], Answers()).grades.append(row)
        result = {}
        for kind, graded in sorted(kinds.items()):
            found = estimates(graded)
            right = found["right"]
            ends = {"right_low": right.low, "right_high": right.high, "prompts": right.n}
            result[kind] = {key: found[key].value for key in ("gold", "correct", "right")} | ends
        return result

    def _changes(self) -> dict[str, dict[str, dict[str, float]]]:
        """What each model has lost or gained since SFT, model -> measure -> change with its interval."""
        if "sft" not in self.answers:
            return {}
        before = measures(self.answers["sft"])
        return {
            name: {
                key: {"change": (change := measured.change(before[key])).value, **_interval(change)}
                for key, measured in measures(answers).items()
                if key in before and len(measured.numerators) == len(before[key].numerators)
            }
            for name, answers in self.answers.items()
            if name not in ("base", PROMPTED, "sft")
        }

    def _best_of_figures(self, worths: dict[str, Tensor], best_of: int) -> dict[str, Any]:
        """The SFT model's best of n answers by the reward model: what PPO has to be held against."""
        shown = ("gold", "correct", "right", "score")
        found = {key: estimate for key, estimate in estimates(self.best).items() if key in shown}
        return {
            "n": best_of,
            **{key: found[key].value if key in found else None for key in shown},
            "interval": {key: _interval(estimate) for key, estimate in found.items()},
            "win_rate": {f"best_of_n_vs_{name}": self._rate(worths, "best_of_n", name) for name in self.answers},
        }


def _interval(estimate: Estimate) -> dict[str, float]:
    return {"low": estimate.low, "high": estimate.high, "prompts": estimate.n}
