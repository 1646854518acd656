"""``report.html``: what a run did, on one page."""

from lit_rlhf.apps.report.report import page_of, write_report

__all__ = ["page_of", "write_report"]
