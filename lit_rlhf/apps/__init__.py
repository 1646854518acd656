"""What a person looks at or sits in front of."""

from lit_rlhf.apps.report import write_report

__all__ = ["write_report"]
