"""HTML pages from the templates beside this file.

What a model wrote is text from a stranger: a page escapes it, makes control characters visible, and forbids itself
scripts and requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lit_rlhf.apps.display import duration, figure, number, percent, printable, tone

FOLDER = Path(__file__).parent


def render(template: str, **values: Any) -> str:
    """A page as HTML."""
    environment = Environment(
        loader=FileSystemLoader([FOLDER, FOLDER / "report"]),
        autoescape=True,
        finalize=printable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, figure=figure, percent=percent, duration=duration, tone=tone)
    return environment.get_template(template).render(**values)
