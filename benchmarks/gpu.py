"""What this package makes of one GPU, in one command of at most eight minutes, with nothing to download.

    python benchmarks/gpu.py                          # one CUDA device; writes results/gpu.json and docs/gpu.md
    python benchmarks/gpu.py --device cpu --small     # the same code on a CPU; prints, and writes nothing

Tests that need CUDA; the share of the measured matrix-product rate that pretraining in bfloat16 reaches; sampling by
the own engine, with CUDA graphs, against transformers' ``generate``; SFT, reward model and PPO as the command runs
them, with their peak of memory against ``stage=plan``; FSDP2 on one device. Models are fresh, texts are made here."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from cluster import needs
from harness import RESULTS, machine, quiet, versions
from page import renewed
from timed_stages import FILE, now
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from users import CONSTANT, OPTIMIZER, fit
from workload import SHAPES, VOCABULARY, LlamaShape, chat_tokenizer, make_models, prompts, write_answers, write_text

from lit_rlhf.rollouts import Sampling, generate
from lit_rlhf.stages import PretrainDataModule, PretrainModule

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "gpu.md"
CUDA_TESTS = [
    "tests/training/test_optim.py::test_offloaded_state_is_in_the_cpus_memory_and_the_numbers_are_the_same",
    "tests/models/test_generation.py::test_replayed_steps_give_the_same",
]
TINY = LlamaShape(layers=2, width=64, heads=4, kv_heads=2, inner=128, vocabulary=VOCABULARY)
Rows = list[dict[str, Any]]


class Size(NamedTuple):
    """How large everything is."""

    device: str
    small: bool

    def of(self, large: Any, small: Any) -> Any:
        return small if self.small else large

    @property
    def accelerator(self) -> str:
        return "gpu" if self.device == "cuda" else "cpu"


# ------------------------------------------------------------------------------------------------------- sections


def cuda_tests(size: Size) -> Rows:
    """Tests that need CUDA."""
    if size.device == "cpu":
        return [{"tests": len(CUDA_TESTS), "outcome": "not run: they need CUDA"}]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *CUDA_TESTS]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    return [{"tests": len(CUDA_TESTS), "outcome": (done.stdout.strip().splitlines() or ["nothing"])[-1]}]


def peak_tflops(size: Size) -> float:
    """10^12 operations per second of a large product in bfloat16."""
    side, count = size.of((8192, 50), (512, 5))
    a, b = torch.randn(2, side, side, device=size.device, dtype=torch.bfloat16)
    rates = []
    for _ in range(4):
        begun = now(size.device)
        for _ in range(count):
            a @ b
        rates.append(2 * count * side**3 / (now(size.device) - begun) / 1e12)
    return max(rates)


def forward_flops(model: PreTrainedModel, length: int) -> int:
    """Useful operations for each token of rows of ``length``: 2 for each weight of a matrix, the head's included, and 4
    times the width for each token that is attended to, half of the row on average, in each layer."""
    config, head = model.config, model.get_output_embeddings()
    matrices = [m.weight.numel() for m in model.base_model.modules() if isinstance(m, nn.Linear | Conv1D)]
    seen = 2 * config.num_hidden_layers * config.hidden_size * (length + 1)
    return 2 * (sum(matrices) + head.weight.numel()) + seen


def pretraining(size: Size) -> Rows:
    """bf16-mixed steps, and their share of the product's rate."""
    peak = peak_tflops(size)
    length = size.of(1024, 32)
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    gpt2 = {"n_layer": 12, "n_embd": 768, "n_head": 12} | size.of({}, {"n_layer": 2, "n_embd": 64, "n_head": 2})
    llama = {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    }  # fmt: skip
    llama |= size.of({}, {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2})
    configs = {
        "GPT-2, 124M": GPT2Config(n_positions=length, activation_function="gelu_pytorch_tanh", **dropout, **gpt2),
        "Llama, 1B": LlamaConfig(max_position_embeddings=length, tie_word_embeddings=True, **llama),
    }
    found = []
    for name, config in configs.items():
        with torch.device(size.device):
            model = AutoModelForCausalLM.from_config(config)
        rows = size.of(16, 2)
        seconds = seconds_of_a_step(size, model, length, rows)
        tflops = 3 * forward_flops(model, length) * rows * length / seconds / 1e12
        rates = {"tokens/s": rows * length / seconds, "TFLOP/s": tflops, "share of matmul": tflops / peak}
        found.append({"model": name, **rates, "matmul TFLOP/s": peak})
        del model
    return found


def seconds_of_a_step(size: Size, model: PreTrainedModel, length: int, rows: int) -> float:
    """Of pretraining, in the middle."""
    steps, ends = size.of(12, 4), []
    with tempfile.TemporaryDirectory() as folder:
        text = write_text(Path(folder) / "text.txt", (steps + 2) * rows * (length + 1) * 10 // 9)
        tokenizer = chat_tokenizer()
        data = PretrainDataModule(str(text), tokenizer, block_size=length, batch_size=rows)
        module = PretrainModule(model, tokenizer, optimizer=OPTIMIZER, schedule=CONSTANT)
        fit(
            module, data, steps, lambda *_, **__: ends.append(now(size.device)), lambda *_: {"amount": 0},
            accelerator=size.accelerator, precision="bf16-mixed", kept_gib=size.of(40.0, 0.5),
        )  # fmt: skip
    return median(b - a for a, b in pairwise(ends[1:]))


def sampling(size: Size) -> Rows:
    """Answers of full length by the own engine, with and without CUDA graphs, and by transformers."""
    count, new = size.of((64, 128), (4, 8))
    tokenizer = chat_tokenizer()
    narrow = {"n_layer": 2, "n_embd": 64, "n_head": 2} if size.small else {}
    with torch.device(size.device):
        model = AutoModelForCausalLM.from_config(GPT2Config(**narrow)).eval()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.requires_grad_(False)
    asked = [(prompt * 32)[:32] for prompt in prompts(count)]
    drawn = Sampling(new, min_new_tokens=new)
    ends = {"eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}

    def own(**settings: Any) -> None:
        generate(model, asked, drawn, seeds=range(count), **ends, **settings)

    def theirs() -> None:
        tokens = torch.tensor(asked, device=size.device)
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": True, "top_k": 0, "top_p": 1.0}
        with torch.no_grad():
            model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)

    engines: dict[str, Callable[[], None]] = {"own": own, "transformers' generate": theirs}
    if size.device == "cuda":
        engines["own, CUDA graphs"] = partial(own, cuda_graphs=True)
    rates = {}
    for name, draw in engines.items():
        seconds = []
        for _ in range(3):
            begun = now(size.device)
            draw()
            seconds.append(now(size.device) - begun)
        rates[name] = count * new / min(seconds[1:])
    slow = rates["transformers' generate"]
    return [{"engine": name, "tokens/s": rate, "times generate": rate / slow} for name, rate in rates.items()]


def stages(size: Size) -> Rows:
    """Iterations of SFT, reward model and PPO in one command, and of SFT under FSDP2; peaks of memory and the plan."""
    with tempfile.TemporaryDirectory() as folder:
        return in_one_command(size, Path(folder))


def in_one_command(size: Size, folder: Path) -> Rows:
    """The same, in a folder."""
    shape, count, longest, batch = size.of((SHAPES["135M"], 256, 256, 32), (TINY, 24, 8, 4))
    policy, _ = make_models(shape, folder)
    files = {"sft": (count, 1), "reward": (count, 4), "ppo": (count, 1)}
    settings = [f"{s}/data=jsonl" for s in files] + [
        f"{stage}.data.path={write_answers(folder / f'{stage}.jsonl', records, answers, longest)}"
        for stage, (records, answers) in files.items()
    ]
    settings += [
        "model=hf", f"model.path={policy}", "logger=csv",
        "callbacks.progress_bar=false", "sft.samples_every=100", "ppo.samples_every=100",
        *(f"{stage}.trainer.max_steps={size.of(6, 2)}" for stage in ("sft", "reward")),
        *(f"{stage}.trainer.limit_val_batches=1" for stage in ("sft", "reward")),
        *(f"{stage}.data.batch_size={batch}" for stage in files), f"ppo.trainer.limit_train_batches={size.of(3, 2)}",
        "ppo.data.limit_held_out=4", "ppo.module.val_samples=1", f"ppo.sampling.max_new_tokens={longest}",
    ]  # fmt: skip
    dpo = ["dpo/data=jsonl", f"dpo.data.path={folder / 'reward.jsonl'}"]  # what is planned, too
    settings += ["threads=1"] if size.small else []
    one = [f"trainer={size.accelerator}"]
    sharded = ["trainer=fsdp", "trainer.devices=1", f"trainer.accelerator={size.accelerator}"]
    if size.device == "cuda":
        sharded += ["trainer.precision=bf16-mixed", "trainer.matmul_precision=high", "trainer.kept_gib=8"]
    planned = needs(["stage=plan", *settings, *one, *dpo], str(folder / "plan"))
    rows = []
    for name, asked, how in (("", [*files], one), (", FSDP2", ["sft"], sharded)):
        laps = run(folder, f"stage=[{','.join(asked)}]", f"run=gpu{len(asked)}", *settings, *how)
        for stage in asked:
            done = json.loads((folder / "runs" / f"gpu{len(asked)}" / stage / "done.json").read_text(encoding="utf-8"))
            plan, measured = planned[stage].gpu or planned[stage].host, done["memory"]["peak_mib"] * 2**20
            rate = median(lap["tokens"] / lap["seconds"] for lap in laps if lap["stage"] == stage)
            peaks = {"peak GiB": measured / 2**30, "planned GiB": plan / 2**30, "planned / peak": plan / measured}
            rows.append({"stage": stage + name, "tokens/s": rate, **peaks, "loss": done["figures"].get("val_loss", "")})
    return rows


def run(folder: Path, *settings: str) -> list[dict[str, Any]]:
    """Run the command with modules that note their iterations; returns these."""
    timed = {"sft": "TimedSFT", "reward": "TimedReward", "ppo": "TimedPPO"}
    settings += tuple(f"{stage}.module._target_=timed_stages.{name}" for stage, name in timed.items())
    laps, paths = folder / f"{settings[1]}.jsonl", [str(REPOSITORY), str(REPOSITORY / "benchmarks")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), FILE: str(laps)}
    command = [sys.executable, "-m", "lit_rlhf", f"paths.runs={folder / 'runs'}", *settings]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{settings[0]}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return [json.loads(line) for line in laps.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------------- the command

SECTIONS: dict[str, Callable[[Size], Rows]] = {
    "Tests that need CUDA": cuda_tests,
    "Pretraining, bf16-mixed": pretraining,
    "Sampling": sampling,
    "Stages": stages,
}


def measure(size: Size) -> dict[str, Any]:
    """Rows, or an error, and seconds of each section."""
    found: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        begun = time.perf_counter()
        try:
            found[name] = {"rows": section(size)}
        except Exception as error:  # the others are measured all the same
            found[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        found[name]["seconds"] = time.perf_counter() - begun
        print(f"{name}: {found[name]['seconds']:.0f} s", file=sys.stderr, flush=True)
    return found


def tables(found: dict[str, Any]) -> str:
    """In Markdown."""
    lines: list[str] = []
    for name, section in found.items():
        lines += [f"### {name} ({section['seconds']:.0f} s)", ""]
        rows = section.get("rows", [{"error": section.get("error")}])
        lines += [f"| {' | '.join(rows[0])} |", f"|{'---|' * len(rows[0])}"]
        lines += [f"| {' | '.join(map(_shown, row.values()))} |" for row in rows] + [""]
    return "\n".join(lines).strip()


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> int:
    """Measure, print, and on a GPU write results and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that a CPU has done in half a minute")
    parser.add_argument("--out", type=Path, help=f"of the JSON file; by default {RESULTS.name}/ for a GPU, else none")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: torch finds no CUDA device here; --device cpu --small runs the same code")
    quiet()
    if arguments.small:
        torch.set_num_threads(1)  # more wait for each other longer than they compute
    found = measure(Size(arguments.device, arguments.small))
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    about = {"device": name, "small": arguments.small, "machine": machine(), "versions": versions()}
    print(tables(found))
    measured = arguments.device == "cuda" and not arguments.small
    if out := arguments.out or (RESULTS if measured else None):
        out.mkdir(parents=True, exist_ok=True)
        (out / "gpu.json").write_text(json.dumps({**about, "sections": found}, indent=1) + "\n", encoding="utf-8")
    if measured:
        said = f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}.\n\n{tables(found)}"
        PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8"), {"measured": said}, "gpu"), encoding="utf-8")
    return int(any("error" in section for section in found.values()))


if __name__ == "__main__":
    sys.exit(main())
