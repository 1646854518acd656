"""What the command costs beside its work: seconds until the first step, and what logging adds to a step.

    python benchmarks/overhead.py [--rounds 5] [--only start|logging]

Start: fresh processes in turns; one imports torch and transformers with a model's and a tokenizer's class, as anyone
does who trains a model, the others run the command. A first step is marked as its batch begins. The files' pages are
warm: a round before the first is not counted. Logging: a linear layer of 8 x 8, trained by Lightning through the same
loop, with nothing logged, and with two figures (``metrics.csv`` and bar included). Prints a table and writes
benchmarks/results/overhead.json."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import transformers
from lightning import LightningModule
from torch import nn

from lit_rlhf.training import MetricsFile, make_trainer
from lit_rlhf.training.batches import BatchLoader, in_order
from lit_rlhf.training.callbacks import StageProgressBar

REPOSITORY = Path(__file__).resolve().parent.parent
IMPORTS = "import torch, transformers\nfrom transformers import AutoTokenizer, GPT2LMHeadModel"
MARKED = """
import os, time
from lit_rlhf.stages import PretrainModule

class Marked(PretrainModule):
    def on_train_batch_start(self, batch, batch_idx):
        print("mark", time.time(), time.process_time(), flush=True)
        os._exit(0)
"""
TRAIN = ["stage=pretrain", "pretrain.module._target_=marked.Marked", "threads=1", "logger=csv", "overwrite=true"]
WHOLE = [*TRAIN, "run=whole", "pretrain.validate_first=false"]
STEPS, FIRST = 1100, 100  # the first ones are not counted


def started(arguments: list[str], folder: Path) -> dict[str, float]:
    """Seconds (wall, of the processor) of a process until its mark, or its end."""
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    begun, before = time.time(), os.times()
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True)
    ended, after = time.time(), os.times()
    marks = [line.split()[-3:] for line in done.stdout.splitlines() if "mark" in line]
    if not marks:
        used = after.children_user + after.children_system - before.children_user - before.children_system
        return {"wall": ended - begun, "cpu": used}
    return {"wall": float(marks[0][1]) - begun, "cpu": float(marks[0][2])}


def starts(rounds: int) -> dict[str, dict[str, list[float]]]:
    """side -> wall and processor seconds of each round."""
    command = ["-m", "lit_rlhf"]
    sides = {
        "import torch, transformers and a model": ["-c", IMPORTS],
        "first step, debug=fast": [*command, *TRAIN, "run=fast", "debug=fast"],
        "first step, the quickstart's text": [*command, *WHOLE],
        "the same, tokenized now": [*command, *WHOLE, "paths.cache=cold"],
        "lit-rlhf --help": [*command, "--help"],
        "a mistyped setting": [*command, "sft.optimizer.lrr=1"],
    }
    found: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "marked.py").write_text(MARKED, encoding="utf-8")
        for count in range(rounds + 1):
            for name, arguments in sides.items():
                shutil.rmtree(Path(folder, "cold"), ignore_errors=True)
                for kind, seconds in started(arguments, Path(folder)).items():
                    found[name][kind] += [seconds] if count else []
    return found


def layer(logs: bool) -> LightningModule:
    """A module that does as little as one can, and logs two figures, or none."""

    class Small(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 8)
            self.seconds: list[float] = []  # of the processor, as each step began

        def on_train_batch_start(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.seconds.append(time.process_time())

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss = self.net(batch).square().mean()
            if logs:
                self.log("small/loss", loss, prog_bar=True)
                self.log("small/lr", 1e-3)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    return Small()


def trained(module: LightningModule, logs: bool) -> float:
    """Milliseconds of the processor a step."""
    batch = torch.randn(4, 8)
    loader = BatchLoader(in_order(4 * STEPS), 4, lambda mine, everyones: batch)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        trainer = make_trainer(
            "cpu", max_steps=STEPS, default_root_dir=folder, enable_progress_bar=logs,
            logger=[MetricsFile(Path(folder, "metrics.csv"))] if logs else False,
            callbacks=[StageProgressBar("small")] if logs else [],
        )  # fmt: skip
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            trainer.fit(module, loader)
    return (module.seconds[-1] - module.seconds[FIRST]) / (STEPS - 1 - FIRST) * 1000


def logged(rounds: int) -> dict[str, dict[str, list[float]]]:
    """side -> milliseconds of the processor a step, of each round."""
    sides: dict[str, Callable[[], float]] = {
        "nothing logged": lambda: trained(layer(False), False),
        "two figures": lambda: trained(layer(True), True),
    }
    found: dict[str, dict[str, list[float]]] = {name: {"cpu": []} for name in sides}
    for count in range(rounds + 1):
        for name, side in sides.items():
            found[name]["cpu"] += [side()] if count else []
    return found


def report(title: str, unit: str, found: dict[str, dict[str, list[float]]]) -> dict[str, object]:
    """Print a table, against its first line; returns what is written down."""
    print(f"\n{title} ({unit}; median, lowest and highest of {len(next(iter(found.values()))['cpu'])})")
    first = {kind: median(values) for kind, values in next(iter(found.values())).items()}
    rows: dict[str, object] = {}
    for name, kinds in found.items():
        cells, row = [], {}
        for kind, values in kinds.items():
            middle = median(values)
            row[kind] = {"median": middle, "lowest": min(values), "highest": max(values), "more": middle - first[kind]}
            span = f"[{min(values):.2f}, {max(values):.2f}]"
            cells.append(f"{kind} {middle:6.2f} {span:15} {middle - first[kind]:+6.2f}")
        rows[name] = row
        print(f"  {name:40} {'   '.join(cells)}")
    return {"unit": unit, "sides": rows}


def main() -> None:
    """Parse the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["start", "logging"])
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    result: dict[str, object] = {
        "work": "overhead",
        "settings": {
            "rounds": arguments.rounds, "threads": 1, "steps": STEPS - FIRST, "load": os.getloadavg()[0],
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        },
    }  # fmt: skip
    if arguments.only != "logging":
        result["start"] = report("start", "seconds", starts(arguments.rounds))
    if arguments.only != "start":
        result["logging"] = report("logging", "milliseconds a step", logged(arguments.rounds))
    if arguments.only is None:
        file = REPOSITORY / "benchmarks" / "results" / "overhead.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"\n{file}")


if __name__ == "__main__":
    main()
