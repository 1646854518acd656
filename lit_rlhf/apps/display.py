"""Names, units and number formats of the report."""

# ruff: noqa: RUF001  minus signs, dashes and the multiplication sign are meant

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from lit_rlhf import errors
from lit_rlhf.stages.stage import GRADES, Model, Tone, all_stages

# What evaluation has beside the models of stages
OTHERS = (Model("prompted", "Prompted base", "teal"), Model("best_of_n", "Best of n", "violet"))
LABELS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
MEASURES, FIGURES, DATA = LABELS["measures"], LABELS["figures"], LABELS["data"]


def printable(value: Any) -> Any:
    """:func:`lit_rlhf.errors.printable` of a text; markup and other values as they are."""
    return errors.printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


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
    """The display name of a model."""
    if name.startswith("round_"):
        return f"Round {name.removeprefix('round_')}"
    if name == "best_of_n":
        return f"Best of {best_of or 'n'}"
    return _models()[name].title if name in _models() else name


def tone(name: str) -> Tone:
    """The colour of a model: the end of a CSS class."""
    return _models()[name].tone if name in _models() else "grey"


def _models() -> dict[str, Model]:
    known = [stage.model for stage in all_stages().values() if stage.model is not None]
    return {model.name: model for model in (*known, *OTHERS)}


def fill_template(template: str, figures: Mapping[str, Any]) -> str | None:
    """A template of a stage's record (see :class:`lit_rlhf.stages.Stage`), filled in; None where one is missing."""
    template = re.sub(r"\[(.*?)\]", lambda optional: fill_template(optional[1], figures) or "", template)
    places = re.findall(r"\{(\w+)(?::(.*?))?\}", template)
    if any(figures.get(key) is None for key, _ in places):
        return None
    for key, form in places:
        value = figures[key]
        first = figures.get(f"{key}_first")
        text = percent(value) if form == "%" else number(value)
        if form == "change" and first is not None:
            text = f"{number(first)} → {text}"
        template = template.replace(f"{{{key}:{form}}}" if form else f"{{{key}}}", text)
    return template
