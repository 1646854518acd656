"""The most memory that a process takes: one run of the command for each case, libraries included.

    python benchmarks/memory.py --checkpoint FOLDER [--cases "PPO"] [--work FOLDER] [--set KEY=VALUE ...]

``--checkpoint`` is a language model of some 100 million parameters as a Hugging Face folder (SmolLM2-135M-Instruct in
docs/memory.md). PPO takes one iteration of 64 answers of 64 tokens each, with a reward model that is the checkpoint
with a fresh head; SFT two steps and a validation of a fresh Gemma-3-like model of 270 million parameters, of which
168 million are the embeddings of 262,144 words. The peak is ``ru_maxrss`` of the process."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Gemma3TextConfig

NEW_TOKENS = 64
COMMON = ("threads=1", "logger=csv", "callbacks.progress_bar=false", "model=hf")
SFT = (
    "stage=sft", "model.path={gemma}", "sft/data=jsonl", "sft.data.path={demonstrations}", "sft.data.batch_size=4",
    "sft.trainer.max_steps=2", "sft.samples_every=100",
)  # fmt: skip
PPO = (
    "stage=ppo", "model.path={checkpoint}", "ppo.policy.path={checkpoint}", "ppo.reward_model.path={reward}",
    "ppo/data=jsonl", "ppo.data.path={prompts}", "ppo.data.batch_size=64", "ppo.data.limit_held_out=8",
    "ppo.trainer.limit_train_batches=1", "ppo.module.val_samples=1", "ppo.sampling.temperature=2.0",
    f"ppo.sampling.max_new_tokens={NEW_TOKENS}", "ppo.samples_every=100",
)  # fmt: skip
HALF = ("ppo.reference.dtype=bfloat16", "ppo.reward_model.dtype=bfloat16")
CASES = {
    "SFT, 262k words, float32": (*SFT, "sft.trainer.precision=32-true"),
    "SFT, 262k words, bf16-mixed": (*SFT, "sft.trainer.precision=bf16-mixed"),
    "PPO": PPO,
    "PPO, frozen models in bfloat16": (*PPO, *HALF),
    "PPO, LoRA, reward model in bfloat16": (*PPO, HALF[1], "ppo.lora.r=8"),
}


def make_inputs(checkpoint: Path, folder: Path) -> dict[str, Path]:
    """What the cases read, by the name that they call it."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    gemma, reward = folder / "gemma", folder / "reward"
    config = Gemma3TextConfig(
        vocab_size=262_144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, max_position_embeddings=32_768, sliding_window=512,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    made = AutoModelForCausalLM.from_config(config), gemma
    scorer = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=1, dtype=torch.float32), reward
    for model, path in (made, scorer):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    random = Random(0)
    words = ["time", "house", "water", "number", "people", "word", "sound", "year", "work", "place"]

    def text(count: int) -> str:
        return " ".join(random.choice(words) for _ in range(count))

    rows = [{"prompt": f"{i} {text(30)}", "response": text(320)} for i in range(64)]
    files = {"demonstrations": rows, "prompts": [{"prompt": row["prompt"]} for row in rows * 2]}
    for name, records in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return {"checkpoint": checkpoint, "gemma": gemma, "reward": reward} | {n: folder / f"{n}.jsonl" for n in files}


def measure(case: str, inputs: dict[str, Path], folder: Path, more: list[str]) -> tuple[float, float]:
    """(GiB, seconds) of a run."""
    overrides = [setting.format(**inputs) for setting in CASES[case]]
    run = f"case{len(list(folder.glob('runs/*')))}"
    command = [sys.executable, "-m", "lit_rlhf", *COMMON, f"run={run}", f"paths.runs={folder / 'runs'}", *overrides]
    begun = time.perf_counter()
    process = subprocess.Popen([*command, *more], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{case}: the run failed")
    return usage.ru_maxrss / 2**20, time.perf_counter() - begun


@contextmanager
def begun(
    about: str, cases: Iterable[str], make_inputs: Callable[[Path, Path], dict[str, Path]]
) -> Iterator[tuple[argparse.Namespace, dict[str, Path], Path]]:
    """(the arguments of the command line, what the cases read, a folder for their runs), with one thread."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases), metavar="CASE")
    parser.add_argument("--work", type=Path, help="where models and runs go; a temporary folder by default")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings for all cases")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        yield arguments, make_inputs(arguments.checkpoint.absolute(), folder), folder


def main() -> None:
    """Measure, and print a table in Markdown."""
    with begun(__doc__, CASES, make_inputs) as (arguments, inputs, folder):
        print("| case | peak | seconds |\n|---|---|---|")
        for case in arguments.cases:
            size, seconds = measure(case, inputs, folder, arguments.set)
            print(f"| {case} | {size:.2f} GiB | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
