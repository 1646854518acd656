"""Every name that a stage logs stands in docs/metrics.md; PPO has a page of its own (see test_ppo_health.py)."""

import re
from pathlib import Path

import pytest

from lit_rlhf.training.metrics_file import read_metrics

PAGE = Path(__file__).parents[2] / "docs/metrics.md"


def undefined(stage):
    defined = set(re.findall(r"^\| `((?:val/)?\w+/\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    logged = {name for row in read_metrics(stage / "metrics.csv").values() for name in row}
    assert logged
    return logged - defined


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward"])
def test_metrics_of_the_pipeline_are_defined(finished_run, stage):
    assert not undefined(finished_run / "runs/quickstart" / stage)


@pytest.mark.parametrize("stage", ["dpo", "classify"])
def test_metrics_of_other_stages_are_defined(finished_run, lit_rlhf, tmp_path, stage):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/quickstart").symlink_to(finished_run / "runs/quickstart")
    lit_rlhf(f"stage={stage}", "run=other", "from_run=quickstart")
    assert not undefined(tmp_path / "runs/other" / stage)
