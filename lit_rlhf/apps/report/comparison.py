"""How the models of a run compare: the headline and its figures, win rates, measures."""

# ruff: noqa: RUF001  minus signs, dashes and the multiplication sign are meant

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from lit_rlhf.apps.charts import tick_step, ticks
from lit_rlhf.apps.display import MEASURES, figure, fill_template, model_name, number, percent
from lit_rlhf.apps.run_reader import Run
from lit_rlhf.stages.evaluate import STAGE as EVALUATE
from lit_rlhf.stages.ppo import STAGE as PPO
from lit_rlhf.stages.pretrain import STAGE as PRETRAIN
from lit_rlhf.stages.sft import STAGE as SFT
from lit_rlhf.stages.stage import SFT_STD, all_stages

PROXY = " (proxy)"  # behind the name of what scores where there is no judge


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
    """The name of the judge: "gold", "reward model (proxy)", an annotator's name, or "" where nothing was compared."""
    evaluation = run.of(EVALUATE)
    in_training = run.of(PPO).get("win_rate") or {}
    return evaluation.get("judge") or in_training.get("judge") or ""


def has_gold(run: Run) -> bool:
    """Whether a judge that knows the right answer has graded anything."""
    graded = [run.of(PPO), *(run.of(EVALUATE).get("models") or {}).values()]
    return judge_of(run) == "gold" or any(figures.get("gold") is not None for figures in graded)


def aligned() -> dict[str, str]:
    """Policies that are trained on preferences -> the stage that does so."""
    return {stage.called: name for name, stage in all_stages().items() if stage.aligns and stage.model}


def compared(run: Run) -> tuple[str, str]:
    """(ours, theirs): the models that the page sets side by side; "" where there is none.

    Ours is what this run has trained on preferences, else the last of those models that was evaluated, else the last
    model. Theirs is the SFT model, else the one before."""
    models = list(run.of(EVALUATE).get("models") or {})
    known = [name for name in aligned() if name in models]
    ours = next((name for name in known if aligned()[name] in run.figures), (known or models or [""])[-1])
    before = models[: models.index(ours)] if ours else []
    return ours, SFT.called if SFT.called in before else (before or [""])[-1]


def headline(run: Run) -> Headline | None:
    """The result of the furthest stage in one sentence."""
    wins = {(win.ours, win.theirs): win for win in win_rates(run)}
    for pair in (compared(run), *((name, SFT.called) for name in aligned()), (SFT.called, PRETRAIN.called), *wins):
        if pair in wins:
            return _win_headline(wins[pair], wins, judge_of(run), run.scored_by)
    for name, stage in reversed(all_stages().items()):
        if stage.headline and (sentence := fill_template(stage.headline, run.figures.get(name, {}))):
            return Headline(*sentence.split("**"))
    return None


def scorer_of(judge: str) -> str:
    """The name of the scorer in a judge's place; "" where there is a judge."""
    return judge.removesuffix(PROXY) if judge.endswith(PROXY) else ""


def _win_headline(win: Win, wins: dict[tuple[str, str], Win], judge: str, scored_by: str) -> Headline:
    """Who is preferred, how often, how sure that is, and by whom."""
    ours, theirs = win.ours_name, win.theirs_name
    proxy = scorer_of(judge)
    by = f"The {proxy} scores" if proxy else "The judge prefers" if judge in ("", "gold") else f"{judge} prefers"
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
    if win.ours in aligned() and best:
        picked = f"{best.ours_name} {theirs} samples, picked by the reward model"
        notes.append(f"{picked}: {percent(best.mean)} ({interval(best)}).")
    prompted = wins.get((SFT.called, "prompted"))
    if prompted and prompted.mean < 0.5 and judge == "gold":
        notes.append(
            f"The base model behind a transcript of questions and answers wins {percent(1 - prompted.mean)} against "
            "SFT: many of the world's demonstrations are faulty on purpose, more than of its corpus; SFT learns that."
        )
    if proxy:
        trained = " that PPO was trained to raise" if win.ours == PPO.called and scored_by in ("", proxy) else ""
        notes.append(f"There is no gold judge here: the {proxy}'s score is a proxy{trained}.")
    return Headline(before, percent(win.mean), after, " ".join(notes))


def cards(run: Run) -> list[Card]:
    """The headline figures of what was run."""
    models = run.of(EVALUATE).get("models", {})
    ours, theirs = compared(run)
    sft = models.get(SFT.called, {})
    found = []
    for key in ("gold", "correct", "right"):
        before, after = (models.get(name, {}).get(key) for name in (theirs, ours))
        if before is not None and after is not None:
            name, unit = MEASURES[key]
            change = f"{model_name(theirs)} → {model_name(ours)}"
            found.append(Card(name, f"{figure(before, unit)} → {figure(after, unit)}", change))
    if sft.get("greedy_right") is not None:
        found.append(Card("SFT, greedy answers", percent(sft["greedy_right"]), "fully right"))
    found += _stage_cards(run.figures)
    return found


def _stage_cards(figures: dict[str, dict[str, Any]]) -> Iterator[Card]:
    ppo = figures.get(PPO.name, {})
    evaluated = _at(figures, f"{EVALUATE.name}.models.{PPO.called}.kl")  # a later round's PPO began elsewhere
    kl = ppo.get("kl") if evaluated is None else evaluated
    if ppo and kl is not None:
        yield Card("KL to SFT", number(kl), "nats per answer, after PPO")
    if ppo.get("score_last") is not None and EVALUATE.name not in figures:
        unit = ppo.get("score_unit", SFT_STD)
        score = f"{number(ppo.get('score_first'))} → {number(ppo['score_last'])}"
        yield Card("Score", score, f"in PPO's rollouts, {unit}")
        if ppo.get("val_sft_score") is not None and ppo.get("val_score") is not None:
            score = f"{number(ppo['val_sft_score'])} → {number(ppo['val_score'])}"
            spread = number(ppo["val_sft_score_std"])
            yield Card("Held-out score", score, f"SFT → PPO, {unit}; standard deviation of SFT's {spread}")
    for name, stage in reversed(all_stages().items()):
        own = figures.get(name, {})
        templates = (
            (card.label, fill_template(card.value, own), fill_template(card.note, own)) for card in stage.cards
        )
        yield from [Card(label, value, note) for label, value, note in templates if value and note is not None][:1]


class Cell(NamedTuple):
    """A measure of a model, with its 95% interval where that is known."""

    value: Any
    low: float | None = None
    high: float | None = None


class Win(NamedTuple):
    """A win rate of one model's answers against another's."""

    ours: str
    theirs: str
    ours_name: str
    theirs_name: str
    mean: float
    low: float
    high: float
    n: int
    prompts: int
    fair: Cell | None = None  # at equal lengths


def interval(win: Win) -> str:
    """ "71.0–77.2%"."""
    return f"{percent(win.low)[:-1]}–{percent(win.high)}"


def win_rates(run: Run) -> list[Win]:
    """Comparisons with SFT first, then those with base, then the rest; best-of-n beside PPO and DPO."""
    evaluation = run.of(EVALUATE)
    best = evaluation.get("best_of_n") or {}
    rates = {**(evaluation.get("win_rate") or {}), **(best.get("win_rate") or {})}
    in_training = run.of(PPO).get("win_rate")
    if not rates and in_training:
        rates = {f"{PPO.called}_vs_{SFT.called}": in_training}
    wins = [_win(name, rate, best.get("n")) for name, rate in rates.items() if rate and "_vs_" in name]
    order = {name: place for place, name in enumerate((SFT.called, PRETRAIN.called, *aligned(), "best_of_n"))}
    strength = {name: place for place, name in enumerate((*aligned(), "best_of_n", SFT.called))}
    return sorted(wins, key=lambda w: (order.get(w.theirs, 9), strength.get(w.ours, 9)))


def _win(name: str, rate: dict[str, Any], best_of: Any) -> Win:
    ours, _, theirs = name.partition("_vs_")
    names = model_name(ours, best_of), model_name(theirs, best_of)
    fair = rate.get("length_controlled")
    controlled = Cell(fair["mean"], fair["low"], fair["high"]) if fair else None
    return Win(ours, theirs, *names, *(rate[key] for key in ("mean", "low", "high", "n", "prompts")), controlled)


class Ladder(NamedTuple):
    """Ratings of all models, the strongest first, in Elo points."""

    models: list[tuple[str, str, dict[str, float]]]  # key, name, "elo" with its "low" and "high"
    low: float  # where the drawing begins
    high: float
    ticks: list[tuple[float, str]]
    anchor: str
    prompts: int


def ladder(run: Run) -> Ladder | None:
    """The ratings of a run's evaluation."""
    evaluation = run.of(EVALUATE)
    found = evaluation.get("ratings")
    if not found:
        return None
    ends = [rated[key] for rated in found["models"].values() for key in ("low", "high")]
    low, high = min(ends) - 20, max(ends) + 20  # room for a point's size
    marks = [(x, number(round(x))) for x, _ in ticks(low, high, tick_step(low, high))]
    best_of = (evaluation.get("best_of_n") or {}).get("n")
    strongest = sorted(found["models"].items(), key=lambda item: -item[1]["elo"])
    models = [(key, model_name(key, best_of), rated) for key, rated in strongest]
    return Ladder(models, low, high, marks, model_name(found["anchor"]), found["prompts"])


class Changes(NamedTuple):
    """Measures (rows) of models (columns)."""

    models: list[tuple[str, str]]  # key, name
    rows: list[tuple[str, str, list[Cell], Cell | None]]  # name, unit, value of each model, change
    change: str  # from which model to which
    compared: tuple[str, str]  # their keys


def changes(run: Run) -> Changes:
    """Measures of each model, best-of-n last, and the differences of the two compared."""
    evaluation, (ours, theirs) = run.of(EVALUATE), compared(run)
    models = dict(evaluation.get("models") or {})
    best = evaluation.get("best_of_n") or {}
    if any(best.get(key) is not None for key in MEASURES):
        models["best_of_n"] = best
    rows = []
    for key, (name, unit) in MEASURES.items():
        cells = [_cell(figures, key) for figures in models.values()]
        before, after = (models.get(name, {}).get(key) for name in (theirs, ours))
        if any(cell.value is not None for cell in cells):
            paired = (evaluation.get("changes") or {}).get(ours, {}).get(key) if theirs == SFT.called else None
            ends = (paired["low"], paired["high"]) if paired else (None, None)
            rows.append((name, unit, cells, None if before is None or after is None else Cell(after - before, *ends)))
    names = [(key, model_name(key, best.get("n"))) for key in models]
    return Changes(names, rows, f"{model_name(theirs)} → {model_name(ours)}", (ours, theirs))


def _cell(figures: dict[str, Any], key: str) -> Cell:
    interval = (figures.get("interval") or {}).get(key) or {}
    return Cell(figures.get(key), interval.get("low"), interval.get("high"))


class Benchmarks(NamedTuple):
    """Tasks that each model was asked by itself."""

    models: list[tuple[str, str]]  # key, name
    rows: list[tuple[str, str, list[str]]]  # task, metric, each model's value with its standard error


def benchmarks(run: Run) -> Benchmarks | None:
    """What ``evaluate.benchmark`` found; None where there was none."""
    models = run.of(EVALUATE).get("models") or {}
    asked = {name: figures["benchmark"] for name, figures in models.items() if figures.get("benchmark")}
    if not asked:
        return None
    tasks = [*dict.fromkeys(task for found in asked.values() for task in found)]
    rows = []
    for task in tasks:
        known = [found.get(task, {}) for found in asked.values()]
        for metric in dict.fromkeys(key for each in known for key in each):
            if not (metric == "n" or metric.endswith("_stderr")):
                rows.append((task, metric, [_with_error(each, metric) for each in known]))
    return Benchmarks([(name, model_name(name)) for name in asked], rows)


def _with_error(found: dict[str, float], metric: str) -> str:
    error = found.get(f"{metric}_stderr")
    return number(found.get(metric)) + (f" ± {number(error)}" if error is not None else "")


def by_kind(run: Run) -> list[tuple[str, list[tuple[str, str, float]]]]:
    """(kind, [(model, its name, share fully right)]), the kinds that our model does best first.

    Theirs and ours, the two that are compared, are the last of each kind."""
    figures = run.of(EVALUATE).get("models") or {}
    ours, theirs = compared(run)
    order = sorted(figures, key=lambda name: (name == ours, name == theirs))
    models = {name: figures[name].get("by_kind") or {} for name in order}
    kinds = list(dict.fromkeys(kind for kinds in models.values() for kind in kinds))
    rows = [
        (kind, [(name, model_name(name), by[kind]["right"]) for name, by in models.items() if kind in by])
        for kind in kinds
    ]
    return sorted(rows, key=lambda row: -row[1][-1][2]) if len(rows) > 1 else []


def rounds(run: Run) -> tuple[list[str], list[tuple[str, str, list[Any]]]]:
    """(numbers of the rounds, [(measure, unit, its value in each round)])."""
    rows = [
        (label, unit, [_at(summary, f"{name}.{address}") for summary in run.rounds.values()])
        for name, stage in all_stages().items()
        for label, unit, address in stage.per_round or ()
    ]
    return list(run.rounds), [row for row in rows if any(value is not None for value in row[2])]


def _at(node: Any, address: str) -> Any:
    for key in address.split("."):
        node = (node or {}).get(key)
    return node
