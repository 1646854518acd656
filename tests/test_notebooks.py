"""Every notebook runs from top to bottom and shows a plot."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from tokenizers import AddedToken

from lit_rlhf.models import policy_from_config, save_model
from lit_rlhf.text import train_bpe

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FAST = os.environ.get("LIT_RLHF_FAST", "1")  # "0": the real budgets, and the checkpoint and data of the environment
SECONDS = 300 if FAST == "1" else 2400  # for one notebook
SAID = {  # notebook -> what its text says of what it prints
    "05_a_reward_of_your_own": [
        r"raised ZeroDivisionError: division by zero, on the prompt",
        r"over_optimization \(iteration",
        r"\nnames_it +0\.[01]\d +(0\.[89]\d|1\.00)",  # of one colour, the right one: few; it is named: nearly always
        r"\nsays_it +(0\.[5-9]\d|1\.00)",
    ],
    "06_reading_a_sick_run": [
        r"large: large_steps", r"flat: score_spread", r"stale: first_step",
        r"stopped, as ppo\.health\.stop asks for, by large_steps",
    ],
}  # fmt: skip
if FAST == "0":  # findings that take the real number of iterations
    SAID["05_a_reward_of_your_own"] += [r"\nreward model +0\.[0-5]\d +.* (0\.9\d|1\.00)", r"\nclassifier +0\.[0-5]\d "]
    SAID["06_reading_a_sick_run"] += [
        r"healthy: no findings", r"free: .*entropy_collapse", r"few: .*worse_held_out", r"critic: poor_critic",
        r"rloo: no findings", r"long: growing_answers, unfinished_answers",
        r"priced: entropy_collapse", r"proxy: over_optimization",
    ]  # fmt: skip

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TINY = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="session")
def records(tmp_path_factory):
    """A folder with demonstrations and pairs, in the form of those that the notebook on checkpoints is written for."""
    sums = [(i, j) for i in range(8) for j in range(8)]
    rows = [{"instruction": f"Add {i} and {j}.", "input": "", "output": f"It is {i + j}."} for i, j in sums]
    rude = ["Are you stupid? It is", "Ugh, it is", "It is, you fool,"]
    pairs = [
        {**row, "chosen": row["output"], "rejected": f"{rude[n % 3]} {n}."} for n, row in enumerate(rows)
    ]  # fmt: skip
    folder = tmp_path_factory.mktemp("data") / "instructions"
    folder.mkdir()
    (folder / "instruction-data.json").write_text(json.dumps(rows))
    (folder / "instruction-data-with-preference.json").write_text(json.dumps(pairs))
    return folder.parent


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory, records):
    """A Llama of two layers with a chat template, in bfloat16, as others publish theirs."""
    tokenizer = train_bpe([(records / "instructions/instruction-data.json").read_text()], 300)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in ("<|im_start|>", "<|im_end|>")])
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    save_model(policy_from_config(TINY, tokenizer).to(torch.bfloat16), tokenizer, folder)
    return folder


@pytest.fixture
def kernel_environment(monkeypatch, records, tiny_checkpoint):
    """What the notebook's process finds: this checkout, no network; small budgets, a tiny checkpoint and records."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("LIT_RLHF_FAST", FAST)
    if FAST == "1":
        monkeypatch.setenv("LIT_RLHF_TEST_CHECKPOINT", str(tiny_checkpoint))
        monkeypatch.setenv("LIT_RLHF_TEST_DATA", str(records))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel draws into the notebook


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, tmp_path, kernel_environment):
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": tmp_path}}
    NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources=resources
    ).execute()  # raises a cell's error
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    printed = "".join(output.get("text", "") for output in outputs)
    assert [wanted for wanted in SAID.get(path.stem, []) if not re.search(wanted, printed)] == []
    assert not list(tmp_path.iterdir())  # a notebook leaves nothing in the current folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
