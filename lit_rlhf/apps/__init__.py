"""What a person looks at or sits in front of."""

from lit_rlhf.apps.few_shot import write_few_shot
from lit_rlhf.apps.ladder import write_ladder
from lit_rlhf.apps.overoptimization import write_overoptimization
from lit_rlhf.apps.report import write_report

__all__ = ["write_few_shot", "write_ladder", "write_overoptimization", "write_report"]
