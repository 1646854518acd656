"""``ladder.html``: the jobs of a sweep side by side, rung by rung, from one start.

All of it is read from the sweep's folder, so that the page can be written again at any time. Jobs that differ in their
seed alone are one rung; jobs that failed are named and left out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from lit_rlhf.apps.charts import Chart, Drawing, Line, Points, draw, reached, tick_step, ticks
from lit_rlhf.apps.page import render
from lit_rlhf.apps.report.comparison import judge_of, scorer_of
from lit_rlhf.apps.run_reader import Run, load_run
from lit_rlhf.apps.sweep_reader import Job, load_jobs, varied
from lit_rlhf.errors import UserError
from lit_rlhf.files import write_text
from lit_rlhf.stages.dpo import STAGE as DPO
from lit_rlhf.stages.evaluate import STAGE as EVALUATE
from lit_rlhf.stages.ppo import STAGE as PPO
from lit_rlhf.stages.sft import STAGE as SFT
from lit_rlhf.stages.stage import SFT_STD, Tone

CURVES = {  # metric: what it is called, its unit
    "ppo/score": ("Score", SFT_STD),
    "ppo/gold": ("Gold grade", "points"),
    "ppo/kl": ("KL to SFT", "nats per answer"),
}
TONES: tuple[Tone, ...] = ("blue", "orange", "teal", "pink", "amber", "violet", "green", "grey")


class Rung(NamedTuple):
    """One way of training, with a run per seed."""

    part: str
    title: str
    adds: str
    formula: str
    tone: Tone  # the end of its CSS class
    runs: list[Run]


class Outcome(NamedTuple):
    """Held-out figures of a rung; the mean over seeds, the interval around all of theirs."""

    title: str
    tone: Tone
    win: float | None
    low: float | None
    high: float | None
    gold: float | None
    correct: float | None
    score: float | None
    kl: float | None
    episodes: int | None
    seconds: float | None


class Noise(NamedTuple):
    """Gradient noise: minibatches to average until the gradient is as long as its error; None: more than were tried."""

    title: str
    tone: Tone
    value: float | None
    share: float  # of the width of the drawing


def write_ladder(sweep: Path) -> Path:
    """Write ``ladder.html`` into the folder of a sweep, with what its jobs left there; returns its path."""
    jobs = load_jobs(Path(sweep))
    rungs = rungs_of(jobs)
    if not rungs:
        raise UserError(f"{sweep}: no job of a sweep has ended well in this folder, so there is nothing to show")
    outcomes = {rung.title: outcome(rung) for rung in rungs}
    noise, noise_ticks = noises(rungs)
    page = render(
        "ladder.html.jinja",
        name="/".join(Path(sweep).resolve().parts[-3:]),
        parts={part: [rung for rung in rungs if rung.part == part] for part in dict.fromkeys(r.part for r in rungs)},
        outcomes=outcomes,
        others=other_models(rungs),
        best=best(list(outcomes.values())),
        proxy=next(filter(None, (scorer_of(judge_of(run)) for rung in rungs for run in rung.runs)), ""),
        seeds=sorted({str(run.seed) for rung in rungs for run in rung.runs}),
        curves={part: charts(rungs, part) for part in dict.fromkeys(rung.part for rung in rungs)},
        noise=noise,
        noise_ticks=noise_ticks,
        failed=[(job, described(job, jobs)) for job in jobs if not job.done],
    )
    return write_text(Path(sweep) / "ladder.html", page)


def rungs_of(jobs: list[Job]) -> list[Rung]:
    """The jobs that ended well, those of one setting together."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        if job.done:
            groups.setdefault(described(job, jobs), []).append(job)
    rungs: list[Rung] = []
    for title, group in groups.items():
        about = {key: text or "" for key, text in group[0].record.get("about", {}).items()}
        part = about.get("part", "")
        tone = TONES[sum(rung.part == part for rung in rungs) % len(TONES)]
        runs = [load_run(job.folder) for job in group]
        rungs.append(Rung(part, title, about.get("adds", ""), about.get("formula", ""), tone, runs))
    return rungs


def described(job: Job, jobs: list[Job]) -> str:
    """The name of a job: its title, and the settings in which it differs otherwise, the seed apart."""
    title = job.record.get("about", {}).get("title")
    names = [name for name in varied(jobs) if name != "seed" and not (title and name == "rung")]
    settings = ", ".join(f"{name.rpartition('.')[2]} {job.settings.get(name, 'as it is')}" for name in names)
    return ", ".join(filter(None, (title, settings))) or "all jobs"


def outcome(rung: Rung) -> Outcome:
    """Held-out figures of what was trained: PPO's own, or those of an evaluation."""
    found = [_outcome(run) for run in rung.runs]
    means = {key: _mean([figures.get(key) for figures in found]) for key in Outcome._fields[2:]}
    lows, highs = ([f[key] for f in found if f.get(key) is not None] for key in ("low", "high"))
    means |= {"low": min(lows, default=None), "high": max(highs, default=None)}
    return Outcome(rung.title, rung.tone, **means)


def _outcome(run: Run) -> dict[str, Any]:
    if ppo := run.of(PPO):
        figures, rate, episodes_seen, stage = ppo, ppo.get("win_rate") or {}, ppo.get("episodes"), PPO
        score = ppo.get("val_score")
    else:
        evaluation = run.of(EVALUATE)
        figures = (evaluation.get("models") or {}).get(DPO.called) or {}
        rate, episodes_seen, stage = (
            (evaluation.get("win_rate") or {}).get(f"{DPO.called}_vs_{SFT.called}") or {},
            None,
            DPO,
        )
        score = figures.get("score")
    known = {key: figures.get(key) for key in ("gold", "correct", "kl")}
    wins = {"win": rate.get("mean"), "low": rate.get("low"), "high": rate.get("high")}
    return {**known, **wins, "score": score, "episodes": episodes_seen, "seconds": run.seconds.get(stage.name)}


def other_models(rungs: list[Rung]) -> list[Outcome]:
    """The SFT model, and its best of n by the reward model, where a job has evaluated them."""
    evaluations = [found for rung in rungs for run in rung.runs if (found := run.of(EVALUATE))]
    rows = []
    models = [(e.get("models") or {}).get(SFT.called) or {} for e in evaluations]
    if any(models):
        known = {key: _mean([m.get(key) for m in models]) for key in ("gold", "correct", "score", "kl")}
        rows.append(Outcome("SFT model", "grey", None, None, None, **known, episodes=None, seconds=None))
    best_of = [e["best_of_n"] for e in evaluations if e.get("best_of_n")]
    if best_of:
        rates = [(b.get("win_rate") or {}).get(f"best_of_n_vs_{SFT.called}") or {} for b in best_of]
        win, low, high = (_mean([rate.get(key) for rate in rates]) for key in ("mean", "low", "high"))
        gold, correct = (_mean([b.get(key) for b in best_of]) for key in ("gold", "correct"))
        title = f"SFT model, best of {best_of[0]['n']}"
        rows.append(Outcome(title, "grey", win, low, high, gold, correct, None, None, None, None))
    return rows


def best(outcomes: list[Outcome]) -> tuple[Outcome, list[str]] | None:
    """The rung that wins most often, and those whose intervals reach into its own."""
    known = [row for row in outcomes if row.win is not None and row.low is not None and row.high is not None]
    if not known:
        return None
    first = max(known, key=lambda row: row.win or 0.0)
    return first, [row.title for row in known if row is not first and (row.high or 0.0) >= (first.low or 0.0)]


def charts(rungs: list[Rung], part: str) -> list[Drawing]:
    """Score, gold and KL against episodes, on the axes that all parts share."""
    drawings = []
    for metric, (title, unit) in CURVES.items():
        curves = {rung.title: curve(rung.runs, metric) for rung in rungs}
        shown = [rung for rung in rungs if rung.part == part and len(curves[rung.title]) > 1]
        if shown:
            room = [point for points in curves.values() for point in points]
            lines = [Line(rung.title, rung.tone, curves[rung.title]) for rung in shown]
            own = shown[0].runs[0].score_unit if unit == SFT_STD else unit
            drawings.append(draw(Chart(title, own, "episodes", lines, room=room)))
    return drawings


def curve(runs: list[Run], metric: str) -> Points:
    """A metric against episodes, the mean over the seeds."""
    values: dict[float, list[float]] = {}
    for run in runs:
        rows = run.course(PPO)
        places = reached(rows, "ppo/episodes")
        for step, row in sorted(rows.items()):
            if math.isfinite(row.get(metric, math.nan)):
                values.setdefault(places[step], []).append(row[metric])
    return [(x, sum(y) / len(y)) for x, y in sorted(values.items())]


def noises(rungs: list[Rung]) -> tuple[list[Noise], list[tuple[float, str]]]:
    """(the noise of each rung's gradient, (place, label) of the ticks below)"""
    known = [(rung, noise) for rung in rungs if (noise := gradient_noise(rung.runs)) is not None]
    values = [noise for _, noise in known if math.isfinite(noise)]
    if not values:
        return [], []
    step = tick_step(0.0, max(values))
    end = math.ceil(max(values) / step) * step
    found = [
        Noise(rung.title, rung.tone, value if math.isfinite(value) else None, min(value / end, 1.0))
        for rung, value in known
    ]
    return found, [(at / end, label) for at, label in ticks(0.0, end, step)]


def gradient_noise(runs: list[Run]) -> float | None:
    """Variance over squared mean of a minibatch's gradient; infinite where no mean was found, None: not measured."""
    rows = [row for run in runs for row in run.course(PPO).values() if "ppo/gradient_variance" in row]
    if not rows:
        return None
    variance, signal = (sum(row[f"ppo/gradient_{name}"] for row in rows) for name in ("variance", "signal"))
    return variance / signal if signal > 0 and variance > 0 else math.inf


def _mean(values: list[Any]) -> Any:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
