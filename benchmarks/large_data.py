"""Data larger than memory: SFT on many generated records, by the command.

    python benchmarks/large_data.py [--records 1000000] [--steps 20] [--work FOLDER]

Two starts of the same stage on records of about 150 tokens: the first reads and tokenizes them, the second finds what
the first has left. Of each: seconds from the start of the process to the first step of training, and the most memory of
its own, pages of files that processes share apart (``RssAnon``). Then the data alone: a shuffled epoch of batches, read
where it lies, in tokens per second, beside what the model trains (a small one: a larger one waits less for its data).
FOLDER takes about 3 KiB for each record, and is deleted if the benchmark has made it."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from random import Random

TOKENS = 150  # of a record, about


def make_model(folder: Path) -> None:
    """A small Llama with a tokenizer of 4,096 pieces."""
    import torch

    from lit_rlhf.models import policy_from_config
    from lit_rlhf.models.checkpoint import save_model
    from lit_rlhf.text import train_bpe
    from lit_rlhf.text.chat import ensure_chat_template

    tokenizer = train_bpe([text for row in records(2000) for text in row.values()], vocab_size=4096)
    ensure_chat_template(tokenizer)
    torch.manual_seed(0)
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512,
    }  # fmt: skip
    save_model(policy_from_config(config, tokenizer), tokenizer, folder)


def records(count: int):
    """Prompts and responses of made-up words, each of its own."""
    random = Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(random.choices(syllables, k=random.randint(1, 4))) for _ in range(3000)]
    weights = [1 / (i + 10) for i in range(len(words))]
    for i in range(count):
        said = random.choices(words, weights, k=132)
        yield {"prompt": f"{i}: {' '.join(said[:44])}?", "response": f"{' '.join(said[44:])}."}


def own_memory() -> int:
    """Bytes of this process that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def start(result: Path, overrides: list[str]) -> None:
    """Run the command in this process, and write down what it took since the time that stands first."""
    begun, *overrides = overrides
    peak = [0]

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], own_memory())
            time.sleep(0.05)

    threading.Thread(target=watch, daemon=True).start()
    from lit_rlhf.pipeline import main
    from lit_rlhf.stages import SFTDataModule, SFTModule

    took: dict[str, float] = {}
    reading, training = SFTDataModule.setup, SFTModule.training_step

    def setup(self, stage=None):
        before = time.time(), time.process_time()
        reading(self, stage)
        took.setdefault("seconds of the data", time.time() - before[0])
        took.setdefault("processor seconds of the data", time.process_time() - before[1])

    def training_step(self, batch, batch_idx):
        took.setdefault("seconds to the first step", time.time() - float(begun))
        took.setdefault("processor seconds to the first step", time.process_time())
        return training(self, batch, batch_idx)

    SFTDataModule.setup, SFTModule.training_step = setup, training_step
    sys.argv = ["lit-rlhf", *overrides]
    try:
        main()
    finally:
        result.write_text(json.dumps({**took, "MiB of its own at most": peak[0] / 2**20}))


def read_epoch(result: Path, work: Path, most: int) -> None:
    """Read at most so many batches of a shuffled epoch."""
    from lit_rlhf.stages import SFTDataModule
    from lit_rlhf.text.tokenizer import load_tokenizer

    data = SFTDataModule(work / "records.jsonl", load_tokenizer(work / "model"), held_out=0.001, cache=work / "cache")
    data.setup()
    before, tokens, loader = (time.time(), time.process_time()), 0, data.train_dataloader()
    for number, batch in enumerate(loader):
        tokens += int(batch.packed.lengths.sum())
        if number + 1 == most:
            break
    seconds, processor = time.time() - before[0], time.process_time() - before[1]
    result.write_text(json.dumps({
        "batches": number + 1, "of": len(loader), "tokens per second": tokens / seconds,
        "tokens per processor second": tokens / processor, "MiB of its own": own_memory() / 2**20,
    }))  # fmt: skip


def measure(work: Path, count: int, steps: int, epoch: int) -> dict[str, object]:
    """The figures of both starts, and of the epoch."""
    if not (work / "records.jsonl").is_file():
        with (work / "records.jsonl.tmp").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in records(count))
        (work / "records.jsonl.tmp").replace(work / "records.jsonl")
    if not (work / "model").is_dir():
        make_model(work / "model")
    found: dict[str, object] = {"records": count, "bytes": (work / "records.jsonl").stat().st_size}
    for name in ("first start", "second start"):
        found[name] = child("start", [
            str(time.time()), "stage=sft", f"run={name.split()[0]}", "model=hf", f"model.path={work}/model",
            "sft/data=jsonl", f"sft.data.path={work}/records.jsonl", f"sft.trainer.max_steps={steps}",
            "sft.data.held_out=0.001", f"paths.runs={work}/runs", f"paths.cache={work}/cache", "logger=csv",
            "threads=1", "sft.validate_first=false", "sft.samples_every=1000000",
        ])  # fmt: skip
    found["epoch"] = child("epoch", [str(work), str(epoch)])
    folders = ("cache", "runs")
    found["bytes in cache and runs"] = sum(
        f.stat().st_size for name in folders for f in (work / name).rglob("*") if f.is_file()
    )
    return found


def child(what: str, arguments: list[str]) -> dict[str, float]:
    """What a process of its own has written down."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        subprocess.run([sys.executable, __file__, f"--{what}", str(result), *arguments], check=True)
        return json.loads(result.read_text())


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--start":
        start(Path(sys.argv[2]), sys.argv[3:])
        return
    if len(sys.argv) > 1 and sys.argv[1] == "--epoch":
        read_epoch(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--epoch-batches", type=int, default=20_000, help="read at most so many batches of an epoch")
    parser.add_argument("--work", type=Path, help="folder for records, tokens and runs")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="lit_rlhf-large-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        found = measure(work, arguments.records, arguments.steps, arguments.epoch_batches)
    finally:
        if arguments.work is None:
            shutil.rmtree(work)
    print(json.dumps({**found, "tokens of a record, about": TOKENS}, indent=2))


if __name__ == "__main__":
    main()
