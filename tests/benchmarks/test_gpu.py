"""The benchmark of a GPU, in its small form on a CPU."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import gpu
import pytest
import torch
from page import BEGIN, END
from transformers import LlamaConfig, LlamaForCausalLM

SCRIPT = Path(gpu.__file__)


@pytest.mark.slow
def test_each_part_runs_on_a_cpu(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(gpu.REPOSITORY)}
    command = [sys.executable, SCRIPT, "--device", "cpu", "--small", "--out", tmp_path]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found["sections"]) == list(gpu.SECTIONS) and found["device"] == "CPU"
    _, pretraining, sampling, stages = (section["rows"] for section in found["sections"].values())
    assert [row["stage"] for row in stages] == ["sft", "reward", "ppo", "sft, FSDP2"]
    assert math.isclose(stages[0]["loss"], stages[3]["loss"], rel_tol=0.02)  # in bfloat16 where the processor has it
    assert all(row["tokens/s"] > 0 for row in (*pretraining, *sampling, *stages))
    assert all(0 < row["share of matmul"] < 1 for row in pretraining)
    assert all(math.isclose(row["planned / peak"] * row["peak GiB"], row["planned GiB"]) for row in stages)
    assert gpu.tables(found["sections"]) in done.stdout


def test_useful_operations_by_hand():
    settings = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 10}
    model = LlamaForCausalLM(LlamaConfig(hidden_size=4, intermediate_size=6, **settings))
    matrices = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 6 + 4 * 10  # queries, keys and values, output, MLP, head
    attended = [4 * 4 * n for n in (1, 2, 3)]  # 4 times the width, for itself and those before it
    assert gpu.forward_flops(model, 3) * 3 == 3 * 2 * matrices + sum(attended)


def test_an_error_of_one_part_is_said_and_the_others_are_measured(monkeypatch):
    def fails(size):
        raise ValueError("no room\nsecond line")

    monkeypatch.setattr(gpu, "SECTIONS", {"one": fails, "other": lambda size: [{"rate": 1234.5, "share": 0.25}]})
    found = gpu.measure(gpu.Size("cpu", True))
    assert found["one"]["error"] == "ValueError: no room"
    assert "| 1,234 | 0.25 |" in gpu.tables(found)


def test_the_page_has_a_place_for_what_is_measured():
    page = gpu.PAGE.read_text(encoding="utf-8")
    assert BEGIN.format("measured", "gpu") in page and END.format("measured") in page
    assert ("Not measured" in page) == (not (gpu.RESULTS / "gpu.json").is_file())
    for test in gpu.CUDA_TESTS:
        path, _, name = test.partition("::")
        assert f"def {name}(" in (gpu.REPOSITORY / path).read_text(encoding="utf-8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")
def test_without_a_gpu_it_says_what_runs(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="no CUDA device here; --device cpu --small"):
        gpu.main()
