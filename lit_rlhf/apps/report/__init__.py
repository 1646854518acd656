"""``report.html``: what a run did, on one page."""

from lit_rlhf.apps.report.report import write_report

__all__ = ["write_report"]
