"""``report.html``: one self-contained page that shows what a run did.

What a model wrote is text from a stranger: the page escapes it, makes control characters visible, and forbids itself
scripts and requests. Python works out what is shown and where; ``report.html.jinja`` beside this file draws it.

``reading.py`` reads the run's folder, ``wording.py`` has the names, units and numbers, and the parts of the page are
worked out in ``road.py`` (the stages), ``results.py`` (how models compare), ``charts.py`` and ``samples.py``."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lit_rlhf.apps.charts import MORE_PPO_PANELS, draw, panels
from lit_rlhf.apps.reading import Run, load_run
from lit_rlhf.apps.results import by_kind, cards, changes, headline, judge_of, win_rates
from lit_rlhf.apps.road import data_table, road, stage_figures
from lit_rlhf.apps.samples import answers, timelines
from lit_rlhf.apps.wording import STAGES, duration, figure, number, percent, printable, tone


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
