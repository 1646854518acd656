"""``report.html``: one self-contained page that shows what a run did.

Python works out what is shown and where; ``report.html.jinja`` beside this file draws it (``page.py``).

``run_reader.py`` reads the run's folder, ``display.py`` has the names, units and numbers. The parts of the page are
worked out in ``overview.py`` (the stages), ``comparison.py`` (how models compare), ``calibration.py`` (the reward
model), ``classification.py`` (classification, few-shot), ``charts.py`` and ``samples.py``."""

from __future__ import annotations

from pathlib import Path

from lit_rlhf.apps.charts import draw, frontier, panels
from lit_rlhf.apps.page import render
from lit_rlhf.apps.report import calibration, classification, comparison, overview, samples
from lit_rlhf.apps.run_reader import Run, load_run
from lit_rlhf.files import write_text
from lit_rlhf.stages.classify import STAGE as CLASSIFY
from lit_rlhf.stages.evaluate import STAGE as EVALUATE
from lit_rlhf.stages.few_shot import STAGE as FEW_SHOT
from lit_rlhf.stages.stage import all_stages


def write_report(run: Path) -> Path:
    """Write ``report.html`` into the folder of a run with at least one stage begun; returns its path."""
    return write_text(Path(run) / "report.html", page_of(load_run(Path(run))))


def page_of(run: Run) -> str:
    """The page as HTML."""
    calibrated, stages = calibration.calibration_chart(run), all_stages()
    return render(
        "report.html.jinja",
        run=run,
        stages=stages,
        begun={*run.figures, *run.metrics},
        evaluated=EVALUATE.name in {*run.figures, *run.metrics},
        few_shot=run.of(FEW_SHOT),
        shown_among=any(not stages[name].own_section for name in {*run.figures, *run.metrics} & stages.keys()),
        judge=comparison.judge_of(run),
        scorer=comparison.scorer_of(comparison.judge_of(run)),
        gold=comparison.has_gold(run),
        headline=comparison.headline(run),
        cards=comparison.cards(run),
        pipeline=overview.pipeline(run),
        cost=overview.cost(run),
        package=overview.package_size(),
        wins=comparison.win_rates(run),
        ladder=comparison.ladder(run),
        changes=comparison.changes(run),
        benchmarks=comparison.benchmarks(run),
        kinds=comparison.by_kind(run),
        rounds=comparison.rounds(run),
        pair_groups=calibration.groups(run),
        calibration=draw(calibrated) if calibrated else None,
        confusion=classification.confusion(run.of(CLASSIFY)),
        shots=classification.by_shots(run.of(FEW_SHOT)),
        curves={stage: [draw(chart) for chart in panels(run, stage)] for stage in stages},
        frontier=[draw(chart) for chart in frontier(run)],
        more_curves={stage: [draw(chart) for chart in panels(run, stage, folded=True)] for stage in stages},
        stage_figures={stage: overview.stage_figures(run.figures.get(stage, {})) for stage in stages},
        answers=samples.answers(run.samples.get(EVALUATE.name, []), *comparison.compared(run)),
        learned={stage: samples.timelines(rows) for stage, rows in run.samples.items() if rows and "step" in rows[0]},
        data=overview.data_table(run.data),
    )
