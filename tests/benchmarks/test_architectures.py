"""Fifteen architectures against their own forward pass, and against the table in the docs."""

from pathlib import Path

import pytest
from architectures import EQUAL, OWN_WAY, examine, tiny

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
FIFTEEN = [
    "gpt2", "llama", "qwen3", "gemma2", "gemma3_text", "granite", "cohere2", "phi3",
    "mistral", "qwen3_moe", "gpt_oss", "bloom", "gpt_neox", "olmo2", "mamba",
]  # fmt: skip


@pytest.mark.parametrize("architecture", FIFTEEN)
def test_it_computes_what_it_computes_itself(architecture):
    row = examine(architecture, tiny(architecture))
    assert set(row.cells[2:]) <= {EQUAL, OWN_WAY}
    assert "| " + " | ".join(row.cells) + " |" in PAGE.read_text(encoding="utf-8").splitlines()
