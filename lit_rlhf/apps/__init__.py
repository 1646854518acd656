"""What a person looks at or sits in front of."""

from lit_rlhf.apps.ladder import write_ladder
from lit_rlhf.apps.overoptimization import write_overoptimization
from lit_rlhf.apps.report import write_report

__all__ = ["write_ladder", "write_overoptimization", "write_report"]
