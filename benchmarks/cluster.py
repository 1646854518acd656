"""What stages of 1, 7 and 70 billion parameters need on 1, 8 and 64 GPUs, by ``lit-rlhf stage=plan``.

    python benchmarks/cluster.py [--rows "7B on 8" ...] [--write]

Plans each row on this machine, which needs no GPU, and prints the table of docs/cluster.md; ``--write`` renews it
there. A row's command stands above it in the output."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path

from page import renewed

from lit_rlhf.pipeline.plan import Need, write_plan
from lit_rlhf.pipeline.run_folder import register_resolvers, remember_world
from lit_rlhf.pipeline.settings import check_settings, compose_settings
from lit_rlhf.training.notices import quiet

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cluster.md"
GIB, PER_MACHINE, ROOM = 2**30, 8, 80  # GPUs of a machine; GiB of a GPU
SHAPES = {  # width, layers, heads, heads of keys and values, width of the MLP: of Llama 3.2 1B, Mistral 7B, Llama 3 70B
    "1B": (2048, 16, 32, 8, 8192),
    "7B": (4096, 32, 32, 8, 14336),
    "70B": (8192, 80, 64, 8, 28672),
}
NAMES = "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"
COMMON = (
    "stage=plan", "trainer=gpu", "trainer.kept_gib=24", "model.config.max_position_embeddings=2048",
    "sft.data.batch_size=64", "ppo.data.batch_size=64", "ppo.sampling.max_new_tokens=512",
)  # fmt: skip
HEAD = (
    "model", "GPUs", "strategy", "SFT: GPU", "SFT: sent", "PPO: GPU", "PPO: sent", "PPO: RAM of a machine, loading",
    "checkpoint of SFT", f"fits into {ROOM} GiB",
)  # fmt: skip
ROWS = [f"{size} on {count}" for size in SHAPES for count in (1, 8, 64)] + ["7B on 1024", "70B on 1024"]


def command(row: str) -> list[str]:
    """The settings of a row."""
    size, count = row.split(" on ")
    shape = [f"model.config.{name}={value}" for name, value in zip(NAMES, SHAPES[size])]
    machines = max(1, int(count) // PER_MACHINE)
    strategy = "auto" if count == "1" else "ddp" if size == "1B" else "fsdp2"
    spread = [f"trainer.devices={int(count) // machines}", f"trainer.num_nodes={machines}"]
    return [*COMMON, *shape, *spread, f"trainer.strategy={strategy}"]


def needs(settings: list[str], folder: str) -> dict[str, Need]:
    """What each stage needs with these settings."""
    register_resolvers()
    cfg = compose_settings([*settings, f"paths.runs={folder}"])
    remember_world(cfg)
    check_settings(cfg)
    quiet()
    with contextlib.redirect_stdout(io.StringIO()):
        return {need.stage: need for need in write_plan(cfg).stages}


def line(row: str, found: dict[str, Need]) -> str:
    """A row of the table; sizes in GiB."""
    size, count = row.split(" on ")
    sft, ppo = found["sft"], found["ppo"]
    fits = [name.upper() for name, need in (("sft", sft), ("ppo", ppo)) if need.gpu <= ROOM * GIB]
    processes = min(int(count), PER_MACHINE)
    cells = [size, count, command(row)[-1].partition("=")[2].replace("auto", "one process")]
    for need in (sft, ppo):
        cells += [_gib(need.gpu), f"{_gib(need.sent)}, {_seconds(need.seconds)}" if need.sent else "nothing"]
    cells += [_gib(processes * ppo.loading), _gib(sft.checkpoint), " and ".join(fits) or "neither"]
    return f"| {' | '.join(cells)} |"


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f}" if size < 10 * GIB else f"{size / GIB:,.0f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW")
    parser.add_argument("--write", action="store_true", help="put the whole table into docs/cluster.md")
    arguments = parser.parse_args()
    table = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    with tempfile.TemporaryDirectory() as folder:
        for row in arguments.rows:
            print(f"lit-rlhf {' '.join(command(row))}", file=sys.stderr, flush=True)
            table.append(line(row, needs(command(row), folder)))
            print(table[-1], flush=True)
    if arguments.write and arguments.rows == ROWS:
        page = renewed(PAGE.read_text(encoding="utf-8"), {"table": "\n".join(table)}, "cluster")
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
