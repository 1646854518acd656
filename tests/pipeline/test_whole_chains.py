"""A whole chain of stages in one start, in two processes of every kind, is what one process makes of it.

What they differ by at most stands in a table of docs/cluster.md; less than what is found here is a failure."""

import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launchers import by_srun, by_torchrun, on_one_node
from safetensors.torch import load_file

PAGE = Path(__file__).parents[2] / "docs" / "cluster.md"
STAGES = ["pretrain", "sft", "preference", "reward", "ppo", "dpo", "classify", "evaluate"]
COLUMNS = {
    "DDP 2": (on_one_node, ["trainer=ddp", "trainer.devices=2"]),
    "FSDP2 2": (on_one_node, ["trainer=fsdp", "trainer.devices=2"]),
    "two nodes by torchrun": (by_torchrun, ["trainer=ddp", "trainer.devices=1", "trainer.num_nodes=2"]),
    "srun": (lambda: by_srun(1), ["trainer=ddp", "trainer.devices=2"]),
}
BATCHES = {  # of all processes together
    "pretrain.data.batch_size": 8, "sft.data.batch_size": 16, "reward.data.batch_size": 8, "ppo.data.batch_size": 16,
    "ppo.module.minibatch_size": 8, "dpo.data.batch_size": 8, "classify.data.batch_size": 16,
}  # fmt: skip
TRAINED = [stage for stage in STAGES if stage not in ("preference", "evaluate")]
# Where a gradient is all but 0, Adam makes of its rounding a step as large as the learning rate; a sampled word is
# another one where the weights differ by enough.
SMALL = [
    "model=pico", "model.config.num_hidden_layers=2", "trainer.precision=32-true", "trainer.accelerator=cpu",
    "reward/head=linear", "pretrain.optimizer.matrix_lr=null",  # test_sharded.py has the likelihood head and Muon
    "pretrain.optimizer.lr=1e-3", "sft.optimizer.lr=3e-4", "reward.optimizer.lr=3e-4", "classify.optimizer.lr=3e-4",
    "ppo.optimizer.lr=1e-4", "ppo.module.critic_lr=3e-4", "dpo.optimizer.lr=1e-4",
    "preference.data.limit=16", "preference.data.limit_held_out=8", "ppo.data.limit_held_out=8",
    "evaluate.data.limit_held_out=8", "evaluate.data.text_documents=50",
    *(f"{stage}.sampling.max_new_tokens=6" for stage in ("preference", "ppo", "dpo.module", "evaluate")),
    *(f"{stage}.trainer.log_every_n_steps=1" for stage in TRAINED),
]  # fmt: skip


@pytest.fixture
def chain(warm, lit_rlhf, tmp_path):
    """(starts, processes, settings) -> the stages' folders of a whole chain; torchrun alone has fresh interpreters."""

    def run(starts, processes, *settings):
        name = f"chain{len([*tmp_path.glob('runs/*')])}"
        batches = [f"{key}={size // processes}" for key, size in BATCHES.items()]
        asked = [f"stage=[{','.join(STAGES)}]", f"run={name}", *SMALL, *batches, *settings]
        _, _, *command = lit_rlhf.command(*asked)
        if launched := [[sys.executable, "-m", *launcher, *command] for launcher, _ in starts if launcher]:
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            begun = [subprocess.Popen(each, cwd=tmp_path, env=lit_rlhf.env, **pipes) for each in launched]
            try:
                said = [process.communicate(timeout=500) for process in begun]
            finally:
                for process in begun:
                    process.kill()
            done = [subprocess.CompletedProcess([], p.returncode, *texts) for p, texts in zip(begun, said)]
        else:
            done = warm.several(command[1:], tmp_path, [{**lit_rlhf.env, **env} for _, env in starts])
        assert not any(each.returncode for each in done), done
        return {stage: tmp_path / "runs" / name / stage for stage in STAGES}

    return run


def written(folder):
    """All figures, losses of each step and samples of a stage, the answers that were ranked too, by their places."""
    found = {"figures": json.loads((folder / "done.json").read_text())["figures"]}
    for file in [
        folder / "samples.jsonl",
        *(folder.parent.glob("data/*.jsonl") if folder.name == "preference" else ()),
    ]:
        found[file.name] = [*map(json.loads, file.read_text().splitlines())] if file.is_file() else []
    if (folder / "metrics.csv").is_file():
        with (folder / "metrics.csv").open(newline="") as file:
            found["rows"] = [{key: float(x) for key, x in row.items() if x} for row in csv.DictReader(file)]
    return dict(leaves(found))


def leaves(found, at=""):
    if isinstance(found, dict | list):
        for key, value in found.items() if isinstance(found, dict) else enumerate(found):
            yield from leaves(value, f"{at}/{key}")
    else:
        yield at, found


def apart(one, other):
    """(what the figures of a stage differ by at most, of those below 1 against 1; what a tensor does against its norm,
    0 where there is none). Words, counts and names are the same."""
    mine, theirs = written(one), written(other)
    real = {key for key, value in mine.items() if isinstance(value, float)}
    assert {k: v for k, v in mine.items() if k not in real} == {k: v for k, v in theirs.items() if k not in real}
    assert all(math.isfinite(mine[key]) and math.isfinite(theirs[key]) for key in real)
    figures = max(abs(mine[key] - theirs[key]) / max(1, abs(mine[key])) for key in real)
    if not (one / "model").is_dir():
        return figures, 0.0
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    return figures, max(float((first[name] - second[name]).norm() / first[name].norm()) for name in first)


def table(found):
    """For the page: powers of ten that have room for another machine's rounding."""
    bound = lambda x: f"1e{max(-6, math.ceil(math.log10(4 * max(x, 1e-9))))}"  # noqa: E731
    lines = [f"| stage | one process | {' | '.join(COLUMNS)} |", f"|{'---|' * (2 + len(COLUMNS))}"]
    for stage in STAGES:
        figures = f"{sum(isinstance(x, float) for x in written(found[stage][0]).values())} figures"
        cells = [", ".join(map(bound, each if stage in TRAINED else each[:1])) for each in found[stage][1:]]
        lines.append(f"| {stage} | {figures} | {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_whole_chain_is_that_of_one_process(chain):
    one = chain([([], {})], 1)
    found = {stage: [one[stage]] for stage in STAGES}
    for starts, settings in COLUMNS.values():
        other = chain(starts(), 2, *settings)
        for stage in STAGES:
            found[stage].append(apart(one[stage], other[stage]))
    said = table(found)
    print(said)  # for the page
    page = re.search(r"<!-- chain: .* -->\n(.*)\n<!-- /chain -->", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
    head, _, *rows = [row.strip("| ").split(" | ") for row in page.splitlines()]
    assert head == ["stage", "one process", *COLUMNS] and [row[0] for row in rows] == STAGES
    for stage, _, *cells in rows:
        for cell, differences in zip(cells, found[stage][1:], strict=True):
            bounds = [float(bound) for bound in cell.split(", ")]
            assert len(bounds) == 1 + (stage in TRAINED) and max(bounds) <= 1e-4
            assert all(x <= bound for x, bound in zip(differences, bounds)), (stage, cell, differences)
