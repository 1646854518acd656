"""The README's section on notebooks, run as it stands: SFT, a reward model, PPO, and a run that is loaded."""

import json
import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_blocks_of_the_readme_run_one_after_the_other(finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-checkpoint").symlink_to(finished_run / "runs/quickstart/sft/model")
    (tmp_path / "runs").symlink_to(finished_run / "runs")
    questions = [f"What colour is animal {n}?" for n in range(12)]
    records = {
        "demonstrations": [{"prompt": q, "response": "It is red."} for q in questions],
        "pairs": [{"prompt": q, "chosen": "It is red.", "rejected": "No."} for q in questions],
        "prompts": [{"prompt": q} for q in questions],
    }
    for name, rows in records.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = README.partition("## In a notebook")[2].partition("\n## ")[0]
    names = {}
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        block = block.replace("Trainer(", "Trainer(logger=False, enable_checkpointing=False, accelerator='cpu', ")
        block = block.replace("limit_train_batches=20", "limit_train_batches=1").replace("=64", "=8")
        exec(block, names)
    assert all((tmp_path / f"my-{name}/model/model.safetensors").is_file() for name in ("sft", "reward", "ppo"))
    assert names["run"].stages[0] == "pretrain"
