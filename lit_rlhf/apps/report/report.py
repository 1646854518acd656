"""``report.html``: one self-contained page that shows what a run did.

Python works out what is shown and where; ``report.html.jinja`` beside this file draws it (``page.py``).

``run_reader.py`` reads the run's folder, ``display.py`` has the names, units and numbers. The parts of the page are
worked out in ``overview.py`` (the stages), ``comparison.py`` (how models compare), ``calibration.py`` (the reward
model), ``classification.py`` (classification, few-shot), ``charts.py`` and ``samples.py``."""

from __future__ import annotations

from pathlib import Path

from lit_rlhf.apps.charts import draw, frontier, panels
from lit_rlhf.apps.page import render
from lit_rlhf.apps.report.calibration import calibration_chart, groups
from lit_rlhf.apps.report.classification import by_shots, confusion
from lit_rlhf.apps.report.comparison import (
    by_kind,
    cards,
    changes,
    compared,
    has_gold,
    headline,
    judge_of,
    ladder,
    rounds,
    scorer_of,
    win_rates,
)
from lit_rlhf.apps.report.overview import data_table, pipeline, stage_figures
from lit_rlhf.apps.report.samples import answers, timelines
from lit_rlhf.apps.run_reader import Run, load_run
from lit_rlhf.files import write_text
from lit_rlhf.stages.stage import all_stages


def write_report(run: Path) -> Path:
    """Write ``report.html`` into the folder of a run with at least one stage begun; returns its path."""
    return write_text(Path(run) / "report.html", page_of(load_run(Path(run))))


def page_of(run: Run) -> str:
    """The page as HTML."""
    calibration, stages = calibration_chart(run), all_stages()
    return render(
        "report.html.jinja",
        run=run,
        stages=stages,
        begun={*run.figures, *run.metrics},
        judge=judge_of(run),
        scorer=scorer_of(judge_of(run)),
        gold=has_gold(run),
        headline=headline(run),
        cards=cards(run),
        pipeline=pipeline(run),
        wins=win_rates(run),
        ladder=ladder(run),
        changes=changes(run),
        kinds=by_kind(run),
        rounds=rounds(run),
        pair_groups=groups(run),
        calibration=draw(calibration) if calibration else None,
        confusion=confusion(run.figures.get("classify", {})),
        shots=by_shots(run.figures.get("few_shot", {})),
        curves={stage: [draw(chart) for chart in panels(run, stage)] for stage in stages},
        frontier=[draw(chart) for chart in frontier(run)],
        more_curves={stage: [draw(chart) for chart in panels(run, stage, folded=True)] for stage in stages},
        stage_figures={stage: stage_figures(run.figures.get(stage, {})) for stage in stages},
        answers=answers(run.samples.get("evaluate", []), *compared(run)),
        learned={
            stage: timelines(samples) for stage, samples in run.samples.items() if samples and "step" in samples[0]
        },
        data=data_table(run.data),
    )
