"""``overoptimization.html``: proxy and gold against the distance from the SFT model, as Gao et al. (arXiv:2210.10760).

All of it is read from the folder of a sweep whose jobs train a reward model, pursue it with PPO, and evaluate the SFT
model with ``best_of``. Gains are measured from the SFT model, in standard deviations of its answers, for the proxy (the
reward model's score) and for gold alike; the distance is the square root of the KL in nats per answer."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean, pstdev
from typing import NamedTuple

import torch

from lit_rlhf.apps.charts import Chart, Drawing, Line, Points, draw
from lit_rlhf.apps.display import number
from lit_rlhf.apps.page import render
from lit_rlhf.apps.run_reader import Run, load_run
from lit_rlhf.apps.sweep_reader import Job, load_jobs
from lit_rlhf.errors import UserError
from lit_rlhf.files import write_text
from lit_rlhf.functional import (
    GainFit,
    Method,
    best_of_n_kl,
    expected_best_of_n,
    fit_best_of_n_gain,
    fit_rl_gain,
    peak_kl,
    rl_gain,
)
from lit_rlhf.stages.evaluate import STAGE as EVALUATE
from lit_rlhf.stages.ppo import STAGE as PPO
from lit_rlhf.stages.reward import STAGE as REWARD
from lit_rlhf.stages.stage import Tone

FITS = 0.8  # R squared from which a fitted curve is drawn
NEAR = 0.01  # nats per answer: a rollout no further away tells where gains begin
WHAT: dict[str, tuple[Tone, str]] = {"proxy": ("blue", "proxy"), "gold": ("orange", "gold")}  # what it is called
COEF_TONES: tuple[Tone, ...] = ("orange", "amber", "green", "teal", "pink", "grey")


class Course(NamedTuple):
    """One run of PPO, rollout by rollout."""

    kl: list[float]  # nats per answer
    proxy: list[float]  # gain over the SFT model, in its standard deviations
    gold: list[float]

    def points(self, what: str) -> Points:
        """(distance, gain) of each rollout."""
        return [(math.sqrt(max(kl, 0.0)), gain) for kl, gain in zip(self.kl, getattr(self, what))]

    @property
    def peak(self) -> tuple[float, float]:
        """(nats, gain) where gold was highest, the mean of three rollouts."""
        windows = [slice(i, i + 3) for i in range(max(len(self.gold) - 2, 1))]
        best = max(windows, key=lambda w: mean(self.gold[w]))
        return mean(self.kl[best]), mean(self.gold[best])

    @property
    def end(self) -> tuple[float, float, float]:
        """(nats, proxy, gold) over the last three rollouts."""
        return mean(self.kl[-3:]), mean(self.proxy[-3:]), mean(self.gold[-3:])


class Pursuit(NamedTuple):
    """PPO against one reward model with one price of the KL."""

    kl_coef: float
    courses: list[Course]  # one per seed

    def points(self, what: str) -> Points:
        """(distance, gain) of each rollout of all seeds."""
        return [point for course in self.courses for point in course.points(what)]

    @property
    def peak(self) -> list[float]:
        """(nats, gain) where gold was highest, the mean over seeds."""
        return [mean(column) for column in zip(*(course.peak for course in self.courses))]

    @property
    def end(self) -> list[float]:
        """(nats, proxy, gold) at the end, the mean over seeds."""
        return [mean(column) for column in zip(*(course.end for course in self.courses))]


class Fitted(NamedTuple):
    """A curve through measured gains."""

    curve: GainFit
    peak: float | None  # nats per answer; None: further than was measured

    @property
    def fits(self) -> bool:
        """Whether the points lie near enough to draw it."""
        return self.curve.r2 >= FITS


class Study(NamedTuple):
    """One reward model: how it was pursued, by PPO and by best-of-n."""

    name: str
    accuracy: float | None  # of the reward model on held-out pairs
    pursuits: list[Pursuit]  # the cheapest KL first
    best_of: dict[str, Points]  # "proxy" and "gold": (distance, gain) for n = 1, 2, 4, ...
    candidates: int  # N per prompt, of which n are drawn
    fits: dict[tuple[Method, str], Fitted]  # (method, what)


def write_overoptimization(sweep: Path) -> Path:
    """Write ``overoptimization.html`` into the folder of a sweep; returns its path."""
    jobs = load_jobs(Path(sweep))
    studies = studies_of([job for job in jobs if job.done])
    if not studies:
        raise UserError(
            f"{sweep}: no job in this folder has trained PPO under a gold judge and evaluated the SFT model with "
            "evaluate.module.best_of, so there is nothing to show"
        )
    page = render(
        "overoptimization.html.jinja",
        name="/".join(Path(sweep).resolve().parts[-3:]),
        studies=studies,
        charts={study.name: charts(study, studies) for study in studies},
        fits_from=FITS,
        failed=[job for job in jobs if not job.done],
    )
    return write_text(Path(sweep) / "overoptimization.html", page)


def studies_of(jobs: list[Job]) -> list[Study]:
    """Jobs of the same reward model together, those from fewer rankings first."""
    groups: dict[int, list[Run]] = {}
    for job in jobs:
        run = load_run(job.folder)
        rankings = run.data.get(REWARD.name, {}).get("train_set")
        if isinstance(rankings, int) and _gold_std(run) and run.of(PPO):
            groups.setdefault(rankings, []).append(run)
    return [_study(f"{number(rankings)} rankings", runs) for rankings, runs in sorted(groups.items())]


def _study(name: str, runs: list[Run]) -> Study:
    by_coef: dict[float, list[Course]] = {}
    for run in runs:
        by_coef.setdefault(float(run.of(PPO)["kl_coef"]), []).append(_course(run))
    pursuits = [Pursuit(coef, courses) for coef, courses in sorted(by_coef.items())]
    best_of, size = _best_of(runs[0])
    measured = {("RL", what): pursuits[0].points(what) for what in WHAT}
    measured |= {("best of n", what): best_of[what] for what in WHAT}
    fits = {key: fit for key, points in measured.items() if (fit := _fit(key[0], points)) is not None}
    return Study(name, runs[0].of(REWARD).get("val_accuracy"), pursuits, best_of, size, fits)


def _fit(method: Method, points: Points) -> Fitted | None:
    """The curve through the points; None where they are too few to tell."""
    distance, gain = torch.tensor(points, dtype=torch.float64).reshape(-1, 2).unbind(1)
    fit = (fit_rl_gain if method == "RL" else fit_best_of_n_gain)(distance, gain)
    return Fitted(fit, peak_kl(fit, method, distance.max().item())) if math.isfinite(fit.r2) else None


def _course(run: Run) -> Course:
    """Gains begin at the mean of the rollouts that are hardly away from the SFT model."""
    rows = [row for _, row in sorted(run.course(PPO).items()) if "ppo/gold" in row]
    first = [row for i, row in enumerate(rows) if i == 0 or row["ppo/kl"] < NEAR]
    gains = []
    for metric, scale in (("ppo/score", 1.0), ("ppo/gold", _gold_std(run))):
        start = mean(row[metric] for row in first)
        gains.append([(row[metric] - start) / scale for row in rows])
    return Course([row["ppo/kl"] for row in rows], *gains)


def _candidates(run: Run) -> list[dict[str, list[float]]]:
    rows = [row["candidates"] for row in run.samples.get(EVALUATE.name, []) if row.get("candidates")]
    return [row for row in rows if row["gold"]]


def _gold_std(run: Run) -> float:
    """Of the SFT model's answers; 0 where they were not graded."""
    return pstdev(grade for row in rows for grade in row["gold"]) if (rows := _candidates(run)) else 0.0


def _best_of(run: Run) -> tuple[dict[str, Points], int]:
    """Expected gains of the best of 1, 2, 4, ... answers, and how many there were to draw from."""
    rows = _candidates(run)
    scores, gold = (torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in ("scores", "gold"))
    size = scores.shape[1]
    sizes = [2**i for i in range(size.bit_length()) if 2**i <= size]
    curves = {}
    for what, worth, scale in (("proxy", scores, 1.0), ("gold", gold, _gold_std(run))):
        start = worth.mean().item()
        gains = [(expected_best_of_n(worth, scores, n).mean().item() - start) / scale for n in sizes]
        curves[what] = [(math.sqrt(best_of_n_kl(n)), gain) for n, gain in zip(sizes, gains)]
    return curves, size


def charts(study: Study, studies: list[Study]) -> list[Drawing]:
    """The three charts of a reward model."""
    first, size = study.pursuits[0], study.candidates
    title = "PPO without a penalty" if first.kl_coef == 0 else f"PPO, kl_coef {first.kl_coef:g}"
    pursued = [line for what in WHAT for line in _pursued(study, what)]
    prices = [
        Line(f"{pursuit.kl_coef:g}", tone, pursuit.points("gold"), "dots")
        for pursuit, tone in zip(study.pursuits, COEF_TONES)
    ]
    near = 1.15 * math.sqrt(best_of_n_kl(size))
    sampled = [line for what in WHAT for line in _sampled(study, what, near)]
    every = [(what, pursuit) for s in studies for pursuit in s.pursuits for what in WHAT]
    room = [point for what, pursuit in every for point in pursuit.points(what)]  # all reward models share their axes
    gold = [point for what, pursuit in every if what == "gold" for point in pursuit.points(what)]
    start = [point for s in studies for what in WHAT for line in _sampled(s, what, near) for point in line.points]
    drawn = [(title, pursued, room), ("Gold by kl_coef", prices, gold), (f"Best of 1 to {size}", sampled, start)]
    return [draw(Chart(name, "SFT std", "√KL to SFT", lines, (0.0, "SFT model"), r)) for name, lines, r in drawn]


def _pursued(study: Study, what: str) -> list[Line]:
    """Rollouts of the first pursuit, and the fitted curve where they lie near it."""
    (tone, called), fitted = WHAT[what], study.fits.get(("RL", what))
    points = study.pursuits[0].points(what)
    lines = [Line(called, tone, points, "dots")]
    if fitted is not None and fitted.fits:
        distance = torch.linspace(0, max(x for x, _ in points), 60, dtype=torch.float64)
        lines.append(Line("", tone, list(zip(distance.tolist(), rl_gain(distance, fitted.curve).tolist())), "curve"))
    return lines


def _sampled(study: Study, what: str, near: float) -> list[Line]:
    """Best of n, and PPO's rollouts no further away."""
    (tone, called), best_of = WHAT[what], study.best_of[what]
    rollouts = [(x, y) for x, y in study.pursuits[0].points(what) if x <= near]
    return [Line(f"{called}, PPO", tone, rollouts, "dots"), Line(f"{called}, best of n", tone, best_of)]
