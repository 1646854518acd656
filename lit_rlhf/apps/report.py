"""``report.html``: one self-contained page that shows what a run did.

Everything is read from the run's folder; any subset of finished stages will do. What a model wrote is text from a
stranger: the page escapes it, makes control characters visible, and forbids itself scripts and requests.
Python works out what is shown and where; ``report.html.jinja`` beside this file draws it."""

# ruff: noqa: RUF001  minus signs, dashes and the multiplication sign are meant

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lit_rlhf.errors import UserError
from lit_rlhf.training import read_metrics

STAGES = {
    "pretrain": "Pretraining",
    "sft": "Supervised fine-tuning",
    "preference": "Preferences",
    "reward": "Reward model",
    "ppo": "PPO",
    "evaluate": "Evaluation",
}
MODELS = {"base": "Base", "sft": "SFT", "ppo": "PPO"}
GRADES = "−1 to 1"
MEASURES = {  # of a model in evaluation: what it is called, its unit
    "gold": ("Gold grade", "points"),
    "correct": ("Correctness", GRADES),
    "right": ("Fully right", "%"),
    "greedy_right": ("Fully right, greedy", "%"),
    "polite": ("Politeness", GRADES),
    "score": ("Reward model's score", "SFT std"),
    "kl": ("KL to SFT", "nats an answer"),
    "entropy": ("Entropy", "nats a token"),
    "words": ("Length", "words"),
}
FIGURES = {  # of a stage, in done.json: what they are called, their unit
    "val_loss_first": ("held-out loss at first", ""),
    "val_loss": ("held-out loss at the end", ""),
    "tokens": ("tokens read", ""),
    "rankings": ("rankings", ""),
    "answers": ("answers", ""),
    "pairs": ("pairs with a winner", ""),
    "ties": ("tied pairs", ""),
    "words": ("words an answer", ""),
    "cut_off": ("answers cut off", ""),
    "agreement": ("agreement with gold", "%"),
    "val_accuracy": ("held-out pairs right", "%"),
    "gold_accuracy": ("gold pairs right", "%"),
    "val_pairs": ("held-out rankings", ""),
    "bag_of_words_accuracy": ("bag of words", "%"),
    "score_first": ("score at first", "SFT std"),
    "score_last": ("score at the end", "SFT std"),
    "val_score": ("held-out score", "SFT std"),
    "kl": ("KL to SFT", "nats an answer"),
    "entropy": ("entropy", "nats a token"),
    "episodes": ("episodes", ""),
    "gold": ("held-out gold grade", "points"),
    "correct": ("held-out correctness", GRADES),
    "prompts": ("held-out prompts", ""),
    "judge": ("judge", ""),
}
DATA = {
    "train_set": "for training",
    "val_set": "held out",
    "train_prompts": "prompts for training",
    "held_out_prompts": "held-out prompts",
}
ANSWERS_SHOWN = 12  # prompts side by side
STEPS_SHOWN = 6  # of the samples through training
TEXT_SHOWN = 1200  # characters of a text
POINTS_DRAWN = 300  # of a line; more are averaged


def write_report(run: Path) -> Path:
    """Write ``report.html`` into the folder of a run with at least one stage begun; returns its path."""
    page = render(load_run(Path(run)))
    path = Path(run) / "report.html"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def render(run: Run) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=printable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, figure=figure, percent=percent, duration=duration, tone=tone)
    evaluation = run.figures.get("evaluate", {})
    return environment.get_template("report.html.jinja").render(
        run=run,
        stages=STAGES,
        begun={*run.figures, *run.metrics},
        judge=judge_of(run),
        headline=headline(run),
        cards=cards(run),
        road=road(run),
        wins=win_rates(run),
        changes=changes(evaluation),
        kinds=by_kind(evaluation),
        curves={stage: [draw(panel) for panel in panels(run, stage)] for stage in STAGES},
        more_curves=[draw(panel) for panel in panels(run, "ppo", MORE_PPO_PANELS)],
        stage_figures={stage: stage_figures(run.figures.get(stage, {})) for stage in STAGES},
        answers=answers(run.samples.get("evaluate", [])),
        learned={stage: timelines(run.samples.get(stage, [])) for stage in ("pretrain", "sft", "ppo")},
        data=data_table(run.data),
    )


# ---------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Run:
    """What was read from the folder of a run; what is not there is left out."""

    name: str
    seed: Any
    date: datetime
    seconds: dict[str, float]  # of the finished stages
    figures: dict[str, dict[str, Any]]  # of the finished stages
    metrics: dict[str, dict[int, dict[str, float]]]
    data: dict[str, dict[str, Any]]
    versions: dict[str, Any]
    settings: dict[str, str]
    samples: dict[str, list[dict[str, Any]]]

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


def load_run(path: Path) -> Run:
    """Read a run's folder."""
    summary = _read_json(path / "summary.json")
    done = {stage: _read_json(path / stage / "done.json") for stage in STAGES}
    done = {stage: record for stage, record in done.items() if record}
    metrics = {stage: read_metrics(path / stage / "metrics.csv") for stage in STAGES}
    metrics = {stage: rows for stage, rows in metrics.items() if rows}
    if not done and not metrics:
        raise UserError(f"{path}: no stage of a run is in this folder, so there is nothing to report on; run one first")
    files = [f for stage in STAGES for f in (path / stage / "done.json", path / stage / "metrics.csv") if f.is_file()]
    return Run(
        name=_run_name(path.resolve()),
        seed=summary.get("seed"),
        date=datetime.fromtimestamp(max(f.stat().st_mtime for f in files)),
        seconds={stage: record["seconds"] for stage, record in done.items() if record.get("seconds") is not None},
        figures={stage: record.get("figures") or {} for stage, record in done.items()},
        metrics=metrics,
        data={stage: record.get("data") or {} for stage, record in done.items()},
        versions={name: v for record in done.values() for name, v in (record.get("versions") or {}).items()},
        settings={s: _read_text(path / s / "config.yaml") for s in STAGES if (path / s / "config.yaml").is_file()},
        samples={stage: _read_jsonl(path / stage / "samples.jsonl") for stage in STAGES},
    )


def _run_name(path: Path) -> str:
    """The folder's name; of a job of a sweep, or of a round, with the run that it belongs to."""
    if path.parent.parent.name == "sweeps":
        return "/".join(path.parts[-4:])
    return "/".join(path.parts[-3:]) if path.parent.name == "rounds" else path.name


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(_read_text(path)) if path.is_file() else {}


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    # Not splitlines(): a text may hold line separators of Unicode.
    return [json.loads(line) for line in _read_text(path).split("\n") if line.strip()]


# --------------------------------------------------------------------- wording

_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # controls, but tab and line feed
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks that turn the direction of what follows
    "\u2028\u2029\ud800-\udfff]"  # separators; halves of a surrogate pair, which UTF-8 does not know
)


def printable(value: Any) -> Any:
    """Text in which every character can be seen (an escape as ``\\x1b``); markup and other values as they are."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return _UNPRINTABLE.sub(lambda m: ascii(m[0])[1:-1], value)


def number(value: Any) -> str:
    """Three significant digits, whole numbers in full; a dash for what is not known."""
    if value is None:
        return "–"
    if isinstance(value, str | bool):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if not math.isfinite(value):
        return str(value).replace("-", "−")
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")  # the exponent after rounding: 0.9996 is 1.00
    if int(exponent) < -4:
        raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{mantissa}×10{raised}".replace("-", "−")
    return f"{value:,.{max(0, 2 - int(exponent))}f}".replace("-", "−")


def percent(share: float | None) -> str:
    """A share as a percentage of three significant digits."""
    if share is None:
        return "–"
    text = number(100.0 * share)
    return ("100" if text == "100.0" else text) + "%"


def figure(value: Any, unit: str) -> str:
    """A figure in its unit: shares as percentages, bounded grades to three decimals, all else as numbers."""
    if unit == GRADES and value is not None:
        return f"{value:.3f}".replace("-", "−")
    return percent(value) if unit == "%" else number(value)


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def model_name(name: str, best_of: Any = None) -> str:
    """What a model is called on the page."""
    return f"Best of {best_of or 'n'}" if name == "best_of_n" else MODELS.get(name, name)


def tone(name: str) -> str:
    """The colour of a model: the end of a CSS class."""
    return name if name in (*MODELS, "best_of_n") else "other"


# -------------------------------------------------------------------- headline


class Headline(NamedTuple):
    """One sentence, its number apart, and what to know about it."""

    before: str
    number: str
    after: str
    note: str = ""


class Card(NamedTuple):
    label: str
    value: str
    note: str = ""


def judge_of(run: Run) -> str:
    """Who graded: "gold", "reward model (proxy)", or "" where nothing was compared."""
    evaluation = run.figures.get("evaluate", {})
    in_training = run.figures.get("ppo", {}).get("win_rate") or {}
    return evaluation.get("judge") or in_training.get("judge") or ""


def headline(run: Run) -> Headline | None:
    """The result of the furthest stage in one sentence."""
    wins = {(win.ours, win.theirs): win for win in win_rates(run)}
    for pair in (("ppo", "sft"), ("sft", "base"), *wins):
        if pair in wins:
            return _win_headline(wins[pair], wins, judge_of(run))
    reward = run.figures.get("reward", {})
    if reward.get("val_accuracy") is not None:
        bag = reward.get("bag_of_words_accuracy")
        beside = f"; a bag of words does so in {percent(bag)}" if bag is not None else ""
        after = f" of the held-out pairs{beside}."
        return Headline("The reward model ranks the preferred answer first in ", percent(reward["val_accuracy"]), after)
    for stage, what in (("sft", "an answer's token"), ("pretrain", "a token")):
        figures = run.figures.get(stage, {})
        if figures.get("val_loss") is not None:
            first = figures.get("val_loss_first")
            began = f", from {number(first)} at first" if first is not None else ""
            before = f"{STAGES[stage]} ended at a held-out loss of "
            return Headline(before, number(figures["val_loss"]), f" nats {what}{began}.")
    return None


def _win_headline(win: Win, wins: dict[tuple[str, str], Win], judge: str) -> Headline:
    """Who is preferred, how often, how sure that is, and by whom."""
    ours, theirs = win.ours_name, win.theirs_name
    proxy = "proxy" in judge
    by = "The reward model scores" if proxy else "The judge prefers"
    than = "above" if proxy else "to"
    before = f"{by} {ours}'s answers {than} {theirs}'s in "
    verdict = ""
    if win.low <= 0.5 <= win.high:
        verdict = ", which is no clear difference"
    elif win.high < 0.5:
        verdict = f": {ours} is worse than {theirs}"
    after = f" of comparisons (95% interval {interval(win)}){verdict}."
    notes = [f"{number(win.n)} answers to {number(win.prompts)} held-out prompts; a tie counts half."]
    best = wins.get(("best_of_n", win.theirs))
    if win.ours == "ppo" and best:
        picked = f"{best.ours_name} {theirs} samples, picked by the reward model"
        notes.append(f"{picked}: {percent(best.mean)} ({interval(best)}).")
    if proxy:
        notes.append("There is no gold judge here: the reward model's score is a proxy that PPO was trained to raise.")
    return Headline(before, percent(win.mean), after, " ".join(notes))


def cards(run: Run) -> list[Card]:
    """The headline figures of what was run."""
    models = run.figures.get("evaluate", {}).get("models", {})
    sft, ppo = models.get("sft", {}), models.get("ppo", {})
    found = []
    for key in ("gold", "correct", "right"):
        before, after = sft.get(key), ppo.get(key)
        if before is not None and after is not None:
            name, unit = MEASURES[key]
            found.append(Card(name, f"{figure(before, unit)} → {figure(after, unit)}", "SFT → PPO"))
    if sft.get("greedy_right") is not None:
        found.append(Card("SFT, greedy answers", percent(sft["greedy_right"]), "fully right"))
    found += _stage_cards(run.figures)
    return found


def _stage_cards(figures: dict[str, dict[str, Any]]) -> Iterator[Card]:
    reward, ppo = figures.get("reward", {}), figures.get("ppo", {})
    if ppo.get("kl") is not None:
        yield Card("KL to SFT", number(ppo["kl"]), "nats an answer, after PPO")
    if ppo.get("score_last") is not None and "evaluate" not in figures:
        score = f"{number(ppo.get('score_first'))} → {number(ppo['score_last'])}"
        yield Card("Score", score, "in PPO's rollouts, SFT std")
    if reward.get("gold_accuracy") is not None:
        yield Card("Reward model", percent(reward["gold_accuracy"]), "of gold pairs ranked right")
    elif reward.get("val_accuracy") is not None:
        yield Card("Reward model", percent(reward["val_accuracy"]), "of held-out pairs ranked right")
    for stage, name in (("sft", "SFT loss"), ("pretrain", "Pretraining loss")):
        loss = figures.get(stage, {}).get("val_loss")
        if loss is not None:
            yield Card(name, _from_to(figures[stage]), "nats a token, held out")


def _from_to(figures: dict[str, Any]) -> str:
    first = figures.get("val_loss_first")
    return ("" if first is None else f"{number(first)} → ") + number(figures["val_loss"])


class Stop(NamedTuple):
    """A stage on the road."""

    stage: str
    name: str
    state: str  # "done", "begun" or "absent"
    seconds: float | None
    share: float  # of the run's time
    note: str


def road(run: Run) -> list[Stop]:
    """All stages in order, those that were not run too."""
    total = run.total_seconds or 1.0
    stops = []
    for stage, name in STAGES.items():
        state = "done" if stage in run.figures else "begun" if stage in run.metrics else "absent"
        seconds = run.seconds.get(stage)
        note = {"begun": "not finished", "absent": "not in this run"}.get(state) or _stop_note(
            stage, run.figures[stage]
        )
        stops.append(Stop(stage, name, state, seconds, (seconds or 0.0) / total, note))
    return stops


def _stop_note(stage: str, figures: dict[str, Any]) -> str:
    known = {key: value for key, value in figures.items() if value is not None}
    if stage in ("pretrain", "sft") and "val_loss" in known:
        return f"loss {_from_to(figures)}"
    if stage == "preference" and "rankings" in known:
        return f"{number(known['rankings'])} rankings"
    if stage == "reward" and "val_accuracy" in known:
        return f"{percent(known['val_accuracy'])} of pairs right"
    if stage == "ppo" and "episodes" in known:
        return f"{number(known['episodes'])} episodes"
    if stage == "evaluate" and "prompts" in known:
        return f"{number(known['prompts'])} prompts"
    return ""


# ------------------------------------------------------------------ comparisons


class Win(NamedTuple):
    """How often one model's answers beat another's."""

    ours: str
    theirs: str
    ours_name: str
    theirs_name: str
    mean: float
    low: float
    high: float
    n: int
    prompts: int


def interval(win: Win) -> str:
    """ "71.0–77.2%"."""
    return f"{percent(win.low)[:-1]}–{percent(win.high)}"


def win_rates(run: Run) -> list[Win]:
    """Comparisons with SFT first, then those with base, then the rest; best-of-n beside PPO."""
    evaluation = run.figures.get("evaluate", {})
    best = evaluation.get("best_of_n") or {}
    rates = {**(evaluation.get("win_rate") or {}), **(best.get("win_rate") or {})}
    in_training = run.figures.get("ppo", {}).get("win_rate")
    if not rates and in_training:
        rates = {"ppo_vs_sft": in_training}
    wins = [_win(name, rate, best.get("n")) for name, rate in rates.items() if rate and "_vs_" in name]
    order = {name: place for place, name in enumerate(("sft", "base", "ppo", "best_of_n"))}
    strength = {name: place for place, name in enumerate(("ppo", "best_of_n", "sft"))}
    return sorted(wins, key=lambda w: (order.get(w.theirs, 9), strength.get(w.ours, 9)))


def _win(name: str, rate: dict[str, Any], best_of: Any) -> Win:
    ours, _, theirs = name.partition("_vs_")
    names = model_name(ours, best_of), model_name(theirs, best_of)
    return Win(ours, theirs, *names, *(rate[key] for key in ("mean", "low", "high", "n", "prompts")))


class Changes(NamedTuple):
    """Measures (rows) of models (columns)."""

    models: list[tuple[str, str]]  # key, name
    rows: list[tuple[str, str, list[Any], float | None]]  # name, unit, value of each model, change from SFT to PPO


def changes(evaluation: dict[str, Any]) -> Changes:
    """What is known of each model, best-of-n last."""
    models = dict(evaluation.get("models") or {})
    best = evaluation.get("best_of_n") or {}
    if any(best.get(key) is not None for key in MEASURES):
        models["best_of_n"] = best
    rows = []
    for key, (name, unit) in MEASURES.items():
        values = [figures.get(key) for figures in models.values()]
        before, after = (models.get(m, {}).get(key) for m in ("sft", "ppo"))
        if any(value is not None for value in values):
            rows.append((name, unit, values, None if before is None or after is None else after - before))
    return Changes([(key, model_name(key, best.get("n"))) for key in models], rows)


def by_kind(evaluation: dict[str, Any]) -> list[tuple[str, list[tuple[str, str, float]]]]:
    """(kind, [(model, its name, share fully right)]), the kinds that PPO (or the last model) does best first."""
    models = {name: figures.get("by_kind") or {} for name, figures in (evaluation.get("models") or {}).items()}
    kinds = list(dict.fromkeys(kind for kinds in models.values() for kind in kinds))
    rows = [
        (kind, [(name, model_name(name), by[kind]["right"]) for name, by in models.items() if kind in by])
        for kind in kinds
    ]
    return sorted(rows, key=lambda row: -row[1][-1][2]) if len(rows) > 1 else []


def stage_figures(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, value with its unit) of a stage's plain figures."""
    found = []
    for key, value in figures.items():
        name, unit = FIGURES.get(key, (key, ""))
        if isinstance(value, int | float | str):
            found.append((name, figure(value, unit) + ("" if unit in ("", "%", GRADES) else f" {unit}")))
    return found


# ----------------------------------------------------------------------- curves


class Panel(NamedTuple):
    """A small chart of some metrics of a stage."""

    title: str
    unit: str  # "%": shares, drawn as percentages
    lines: dict[str, str]  # metric: what it is called
    reference: tuple[float, str] | None = None  # a level to compare with


def _losses(stage: str, unit: str) -> Panel:
    return Panel("Loss", unit, {f"{stage}/loss": "training", f"val/{stage}/loss": "held out"})


PANELS = {
    "pretrain": [_losses("pretrain", "nats a token"), Panel("Learning rate", "", {"pretrain/lr": "schedule"})],
    "sft": [_losses("sft", "nats a response token"), Panel("Learning rate", "", {"sft/lr": "schedule"})],
    "reward": [
        _losses("reward", "nats a pair"),
        Panel(
            "Pairs ranked right",
            "%",
            {
                "reward/accuracy": "training",
                "val/reward/accuracy": "held out",
                "val/reward/gold_accuracy": "held out, by gold",
            },
            (0.5, "chance"),
        ),
        Panel("Margin, preferred − other", "logits", {"reward/margin": "training"}),
        Panel("Learning rate", "", {"reward/lr": "schedule"}),
    ],
    "ppo": [
        Panel(
            "Score",
            "SFT std",
            {"ppo/score": "rollouts", "val/ppo/score": "held out", "ppo/reward": "rollouts, less the KL penalty"},
        ),
        Panel("KL to SFT", "nats an answer", {"ppo/kl": "rollouts", "val/ppo/kl": "held out"}),
        Panel("Win rate against SFT", "%", {"val/ppo/win_rate": "held out"}, (0.5, "as good as SFT")),
        Panel("Gold grade", "points", {"val/ppo/gold": "held out"}),
        Panel("Correctness", GRADES, {"val/ppo/correct": "held out"}),
        Panel("Entropy", "nats a token", {"ppo/entropy": "rollouts"}),
        Panel("Policy loss", "", {"ppo/policy_loss": "clipped surrogate"}),
        Panel("Value loss", "SFT std²", {"ppo/value_loss": "critic"}),
        Panel("Explained variance", "", {"ppo/explained_variance": "critic"}, (0.0, "a constant does as well")),
    ],
}
MORE_PPO_PANELS = [
    Panel("Loss, total", "", {"ppo/loss": "policy + critic"}),
    Panel("Clipped ratios", "%", {"ppo/clip_fraction": "of tokens"}),
    Panel("Step KL", "nats a token", {"ppo/approx_kl": "to the rollout's policy"}),
    Panel("Answer length", "tokens", {"ppo/response_length": "rollouts"}),
    Panel("Answers that ended", "%", {"ppo/finished": "rollouts"}),
    Panel("Value", "SFT std", {"ppo/value": "critic's mean"}),
    Panel("Spread of scores", "SFT std", {"ppo/score_std": "rollouts"}),
    Panel("Gradient norm", "before clipping", {"ppo/grad_norm": "policy", "ppo/critic_grad_norm": "critic"}),
    Panel("Learning rate", "", {"ppo/lr": "policy"}),
]
Points = list[tuple[float, float]]
Scale = Callable[[float], float]


class Chart(NamedTuple):
    """A panel with what was measured."""

    title: str
    unit: str
    x_name: str
    lines: list[tuple[str, str, Points]]  # label, CSS class, points
    reference: tuple[float, str] | None


def panels(run: Run, stage: str, chosen: list[Panel] | None = None) -> Iterator[Chart]:
    """The charts of a stage for which more than one value was logged."""
    rows = run.metrics.get(stage, {})
    places = _episodes(rows) if stage == "ppo" else {step: float(step) for step in rows}
    for panel in PANELS.get(stage, []) if chosen is None else chosen:
        scale = 100.0 if panel.unit == "%" else 1.0
        lines = []
        for place, (metric, label) in enumerate(panel.lines.items()):
            values = {step: row.get(metric, math.nan) for step, row in sorted(rows.items())}
            points = [(places[step], scale * value) for step, value in values.items() if math.isfinite(value)]
            held_out = metric.startswith("val/")
            tone = ("val" if place < 2 else "gold") if held_out else ("train" if place == 0 else "other")
            if points:
                lines.append((label, tone, points))
        if any(len(points) > 1 for *_, points in lines):
            reference = panel.reference and (scale * panel.reference[0], panel.reference[1])
            yield Chart(panel.title, panel.unit, "episodes" if stage == "ppo" else "optimizer steps", lines, reference)


def _episodes(rows: dict[int, dict[str, float]]) -> dict[int, float]:
    """step -> answers sampled so far: what PPO's curves are drawn against."""
    places, reached = {}, 0.0
    for step in sorted(rows):
        reached = rows[step].get("ppo/episodes", reached)
        places[step] = reached
    return places


WIDTH, HEIGHT = 340.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 10.0, 38.0


class Tick(NamedTuple):
    at: float  # in the drawing
    label: str


class Stroke(NamedTuple):
    """A line of a chart, in the drawing's units."""

    label: str
    tone: str
    path: str
    trend: str  # smoothed, where it is noisy
    dots: list[tuple[float, float, str]]  # where there are few
    last: str


class Drawing(NamedTuple):
    """A chart ready to be drawn."""

    chart: Chart
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    strokes: list[Stroke]
    reference: Tick | None


def draw(chart: Chart) -> Drawing:
    """Scales, ticks and paths."""
    x_values = [x for *_, points in chart.lines for x, _ in points]
    y_values = [y for *_, points in chart.lines for _, y in points]
    if chart.reference:
        y_values.append(chart.reference[0])
    x_low, x_high = _widened(min(0.0, *x_values), max(x_values))
    y_low, y_high = _widened(min(y_values), max(y_values))
    if chart.unit == "%":
        y_low, y_high = max(0.0, y_low), min(100.0, y_high)
    x_step, y_step = _tick_step(x_low, x_high), _tick_step(y_low, y_high)
    # A KL of -0.01 does not need an axis that begins at -1: a little may stick out.
    y_low, y_high = math.floor(y_low / y_step + 0.08) * y_step, math.ceil(y_high / y_step - 0.08) * y_step
    last = math.ceil(x_high / x_step) * x_step
    x_high = last if last - x_high < 0.06 * (last - x_low) else x_high  # a last tick, where little room is lost

    def x_at(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y_at(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    strokes = [_stroke(label, tone, points, x_at, y_at, chart.unit) for label, tone, points in chart.lines]
    return Drawing(
        chart,
        [Tick(x_at(x), label) for x, label in _ticks(x_low, x_high, x_step)],
        [Tick(y_at(y), label) for y, label in _ticks(y_low, y_high, y_step)],
        strokes,
        Tick(y_at(chart.reference[0]), chart.reference[1]) if chart.reference else None,
    )


def _stroke(label: str, tone: str, points: Points, x_at: Scale, y_at: Scale, unit: str) -> Stroke:
    size = -(-len(points) // POINTS_DRAWN)
    thinned = [_mean(points[i : i + size]) for i in range(0, len(points), size)]
    few = len(points) <= 12
    suffix = "%" if unit == "%" else ""
    dots = [(x_at(x), y_at(y), f"{number(x)}: {number(y)}{suffix}") for x, y in points] if few else []
    trend = _path(_smoothed(thinned), x_at, y_at) if _noisy(thinned) else ""
    return Stroke(label, tone, _path(thinned, x_at, y_at), trend, dots, number(points[-1][1]) + suffix)


def _path(points: Points, x_at: Scale, y_at: Scale) -> str:
    return "M" + "L".join(f"{x_at(x):.1f} {y_at(y):.1f}" for x, y in points)


def _mean(points: Points) -> tuple[float, float]:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def _noisy(points: Points) -> bool:
    """Whether a line jumps about so much that its course is hard to see."""
    values = [y for _, y in points]
    bends = [abs(after - 2 * here + before) for before, here, after in zip(values, values[1:], values[2:])]
    return len(points) > 20 and sum(bends) / len(bends) > 0.06 * (max(values) - min(values))


def _smoothed(points: Points) -> Points:
    """At each point the straight line that fits best an eighth of the line around it."""
    width = max(5, len(points) // 8)
    smooth = []
    for i, (x, _) in enumerate(points):
        first = min(max(0, i - width // 2), len(points) - width)  # as many points at the ends as elsewhere
        around = points[first : first + width]
        mean_x, mean_y = _mean(around)
        spread = sum((u - mean_x) ** 2 for u, _ in around)
        slope = sum((u - mean_x) * (v - mean_y) for u, v in around) / spread if spread else 0.0
        low, high = min(v for _, v in around), max(v for _, v in around)
        smooth.append((x, min(max(mean_y + slope * (x - mean_x), low), high)))
    return smooth


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty."""
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    margin = abs(low) / 2 or 1.0
    return low - margin, high + margin


def _tick_step(low: float, high: float) -> float:
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999) * power


def _ticks(low: float, high: float, step: float) -> Iterator[tuple[float, str]]:
    """Multiples of ``step`` from ``low`` to ``high`` with labels of equally many decimals."""
    for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        yield i * step, _tick_label(i * step, step)


def _tick_label(value: float, step: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if step >= size / 10 and abs(value) >= size:
            return f"{value / size:g}{letter}".replace("-", "−")
    if step < 1e-4:
        return f"{value:.3g}".replace("e-0", "e-").replace("-", "−")
    return f"{value:.{len(f'{step:.6f}'.rstrip('0').split('.')[1])}f}".replace("-", "−")


# ---------------------------------------------------------------------- answers


class Answer(NamedTuple):
    """A text with what was thought of it: (CSS class, label) badges."""

    text: str
    badges: list[tuple[str, str]]


class Column(NamedTuple):
    """What one model wrote for one prompt."""

    model: str
    name: str
    first: Answer
    others: list[tuple[str, Answer]]  # how it was drawn


class Row(NamedTuple):
    """A prompt and the models' answers."""

    kind: str
    dialogue: list[tuple[str, str]]  # role, text
    outcome: str  # of the last model's first sample against the one before it: "better", "worse", "same" or ""
    columns: list[Column]


class Answers(NamedTuple):
    """The prompts shown, and how the first samples of all prompts compare."""

    rows: list[Row]
    prompts: int
    better: int
    same: int
    worse: int
    ours: str
    theirs: str


def answers(samples: list[dict[str, Any]]) -> Answers:
    """A dozen prompts of all kinds, chosen to show wins and losses."""
    outcomes = [_outcome(sample["models"]) for sample in samples]
    count = {what: outcomes.count(what) for what in ("better", "same", "worse")}
    names = [model_name(name) for name in list(samples[0]["models"])[-2:]] if samples else []
    ours, theirs = (names[1], names[0]) if len(names) == 2 else ("", "")
    rows = [_row(samples[i], outcomes[i]) for i in _chosen(samples, outcomes)]
    return Answers(rows, len(samples), count["better"], count["same"], count["worse"], ours, theirs)


def _outcome(models: dict[str, Any]) -> str:
    worths = [_worth(model) for model in list(models.values())[-2:]]
    if len(worths) < 2 or None in worths:
        return ""
    theirs, ours = worths
    return "better" if ours > theirs else "worse" if ours < theirs else "same"


def _worth(model: dict[str, Any]) -> float | None:
    if model.get("grades"):
        return model["grades"][0]["gold"]
    return model["scores"][0] if model.get("scores") else None


def _chosen(samples: list[dict[str, Any]], outcomes: list[str]) -> list[int]:
    """Which prompts are shown: kinds take turns, so do wins and losses; the rest is chance (the same each time)."""
    pools: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        pools.setdefault(sample.get("kind") or "", []).append(i)
    for pool in pools.values():
        Random(0).shuffle(pool)
    wanted = ("better", "worse", "better", "same")
    chosen: list[int] = []
    while len(chosen) < min(ANSWERS_SHOWN, len(samples)):
        for pool in pools.values():
            if pool and len(chosen) < ANSWERS_SHOWN:
                want = wanted[len(chosen) % len(wanted)]
                found = next((i for i in pool if outcomes[i] == want), pool[0])
                pool.remove(found)
                chosen.append(found)
    return sorted(chosen)


def _row(sample: dict[str, Any], outcome: str) -> Row:
    prompt = sample["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    dialogue = [(m["role"], shortened(m["content"])) for m in messages]
    return Row(sample.get("kind") or "", dialogue, outcome, [_column(*item) for item in sample["models"].items()])


def _column(name: str, model: dict[str, Any]) -> Column:
    scores, grades = model.get("scores"), model.get("grades")
    drawn = [
        Answer(shortened(text), _badges(grades and grades[i], None if scores is None else scores[i]))
        for i, text in enumerate(model["samples"])
    ]
    greedy = Answer(shortened(model["greedy"]), _badges(model.get("greedy_grade"), None))
    others = [("greedy", greedy), *((f"sample {i}", answer) for i, answer in enumerate(drawn[1:], start=2))]
    return Column(name, model_name(name), drawn[0], others)


def _badges(grade: dict[str, Any] | None, score: float | None) -> list[tuple[str, str]]:
    badges = []
    if grade:
        if grade["right"]:
            badges.append(("good", "✓ right"))
        elif grade["correct"] < 0:
            badges.append(("bad", "✗ wrong"))
        else:
            badges.append(("half", "partly right" if grade["correct"] > 0 else "no answer"))
        if grade["polite"]:
            badges.append(("good", "polite") if grade["polite"] > 0 else ("bad", "rude"))
        badges.append(("", f"gold {grade['gold']:g}".replace("-", "−")))
    if score is not None:
        badges.append(("", f"score {number(score)}"))
    return badges


def shortened(text: str) -> str:
    """At most ``TEXT_SHOWN`` characters, and a word on the rest."""
    rest = len(text) - TEXT_SHOWN
    return text if rest <= 0 else f"{text[:TEXT_SHOWN]}… ({number(rest)} more characters)"


def timelines(samples: list[dict[str, Any]], prompts: int = 2) -> list[tuple[str, list[tuple[int, str]]]]:
    """(prompt, [(step, text)]) of some prompts, at steps spread evenly over training."""
    steps = _spread(sorted({sample["step"] for sample in samples}), STEPS_SHOWN)
    lines: dict[tuple[str, int], list[tuple[int, str]]] = {}  # several texts of a step may begin alike: a line each
    for step in sorted(steps):
        seen: list[str] = []
        for sample in (sample for sample in samples if sample["step"] == step):
            prompt = sample["prompt"]
            lines.setdefault((prompt, seen.count(prompt)), []).append((step, shortened(sample["text"])))
            seen.append(prompt)
    chosen = sorted(_spread(range(len(lines)), prompts))
    return [(shortened(prompt), texts) for (prompt, _), texts in (list(lines.items())[i] for i in chosen)]


def _spread(items: Sequence[int], count: int) -> set[int]:
    if len(items) <= count:
        return set(items)
    return {items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)}


class Data(NamedTuple):
    """Counts (columns) of the stages' data (rows), and the lines behind a count."""

    names: list[str]
    rows: list[tuple[str, list[str]]]
    details: list[tuple[str, str, list[str]]]


def data_table(data: dict[str, dict[str, Any]]) -> Data | None:
    """What each stage read; a list stands for as many records as it has entries."""
    notes = {stage: dict(_flat(counts)) for stage, counts in data.items() if counts}
    keys = list(dict.fromkeys(key for counts in notes.values() for key in counts))
    keys.sort(key=lambda key: key in ("skipped", "long"))
    rows = [(stage, [_count(counts.get(key)) for key in keys]) for stage, counts in notes.items()]
    details = [
        (stage, _label(key), [str(line) for line in value[:20]])
        for stage, counts in notes.items()
        for key, value in counts.items()
        if isinstance(value, list) and value
    ]
    return Data([_label(key) for key in keys], rows, details) if rows else None


def _label(key: str) -> str:
    return DATA.get(key, key.replace("_", " "))


def _count(value: Any) -> str:
    return number(len(value) if isinstance(value, list) else value)


def _flat(notes: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in notes.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key} ")
        else:
            yield prefix + key, value
