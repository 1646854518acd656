"""All pairs of a ranking in one batch element, against a batch of pairs: seconds a comparison, and what is learned.

    python benchmarks/grouped_rankings.py runs/quickstart [--train]

Takes the SFT model and the rankings of a finished run. Both ways learn from the same comparisons and have the same
loss: a ranking of K answers is read in K forward passes, its C(K,2) pairs alone in K (K - 1). Each repetition times
both on the same prompts, one after the other in turns, so what else the machine does falls on both. ``--train`` also
trains a reward model each way, for one epoch over the same comparisons, and prints its accuracy."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import mean, median, stdev

import torch
import yaml
from lightning import seed_everything

from lit_rlhf.functional import ranking_loss, ranking_pairs
from lit_rlhf.models import RewardHead, load_reward_model
from lit_rlhf.models.heads import packed_scores
from lit_rlhf.stages import RewardModule, WorldRewardDataModule
from lit_rlhf.stages.rankings import EncodedRanking, RankingBatch
from lit_rlhf.text import load_tokenizer
from lit_rlhf.text.records import write_jsonl
from lit_rlhf.text.world import World
from lit_rlhf.training import adamw, make_trainer

PROMPTS = 8  # a step


def as_pairs(item: EncodedRanking) -> list[EncodedRanking]:
    """Every untied pair of a ranking as a ranking of its own."""
    return [
        EncodedRanking(*([column[i], column[j]] for column in item[:3]), None, [item.ratings[0]] * 2, *item[5:])
        for i, j in combinations(range(len(item.ranks)), 2)
        if item.ranks[i] != item.ranks[j]
    ]


def loaded(run: Path, seed: int, path: Path, batch_size: int) -> WorldRewardDataModule:
    """Rankings in ``path``, of the run's world."""
    settings = yaml.safe_load((run / "preference" / "config.yaml").read_text(encoding="utf-8"))
    data = WorldRewardDataModule(
        path,
        load_tokenizer(run / "sft" / "model"),
        World(settings["world"]["seed"]),
        split_seed=settings["split"]["seed"],
        batch_size=batch_size,
        seed=seed,
    )
    data.setup()
    return data


def batch_of(data: WorldRewardDataModule, items: list[EncodedRanking]) -> RankingBatch:
    """All of ``items`` in one batch."""
    everyone = list(range(len(items)))
    return data.collate(items, everyone, everyone)


def step_seconds(model: torch.nn.Module, batch: RankingBatch) -> float:
    """Seconds of a forward and a backward pass."""
    begun = time.perf_counter()
    ranking_loss(packed_scores(model, batch.packed), ranking_pairs(batch.ranks, batch.prompt_index)).backward()
    return time.perf_counter() - begun


def compare_time(run: Path, data: WorldRewardDataModule, repetitions: int) -> None:
    """Print seconds a comparison, each way, and their paired ratio."""
    model = load_reward_model(run / "sft" / "model", data.tokenizer, new_head=True).train()
    untied = [item for item in data.train_set if len(set(item.ranks)) == len(item.ranks)]
    grouped, paired = [], []
    for turn in range(repetitions + 2):  # the first two warm up
        items = untied[turn * PROMPTS : (turn + 1) * PROMPTS]
        pairs = [pair for item in items for pair in as_pairs(item)]
        ways = [(grouped, batch_of(data, items)), (paired, batch_of(data, pairs))]
        for seconds, batch in ways if turn % 2 else ways[::-1]:
            seconds.append(step_seconds(model, batch) / len(pairs))
            model.zero_grad()
    ratios = [p / g for g, p in zip(grouped[2:], paired[2:])]
    error = 1.96 * stdev(ratios) / len(ratios) ** 0.5
    print(f"{len(ratios)} repetitions of {PROMPTS} prompts with 4 answers, 6 comparisons each; medians:")
    print(f"  grouped  {1e3 * median(grouped[2:]):.3f} ms a comparison")
    print(f"  pairs    {1e3 * median(paired[2:]):.3f} ms a comparison")
    low, high = mean(ratios) - error, mean(ratios) + error
    print(f"  pairs take {mean(ratios):.2f} times as long (95% interval {low:.2f}-{high:.2f})")


def compare_learning(run: Path, seed: int, folder: Path) -> None:
    """Print the held-out accuracy of a reward model trained each way, and the seconds it took.

    Pairs are shuffled as records of their own, as many comparisons a step as there are in a step of rankings."""
    rows = [json.loads(line) for line in (run / "data" / "rankings-0.jsonl").read_text(encoding="utf-8").splitlines()]
    pairs = [
        {"prompt": r["prompt"], **{key: [r[key][i], r[key][j]] for key in ("responses", "ranks")}}
        for r in rows
        for i, j in combinations(range(len(r["ranks"])), 2)
        if r["ranks"][i] != r["ranks"][j]
    ]
    write_jsonl(folder / "pairs.jsonl", pairs)
    for name, path, size in (
        ("grouped", run / "data" / "rankings-0.jsonl", PROMPTS),
        ("pairs", folder / "pairs.jsonl", round(PROMPTS * len(pairs) / len(rows))),
    ):
        data = loaded(run, seed, path, size)
        seed_everything(seed, verbose=False)
        head = RewardHead("likelihood")
        model = load_reward_model(run / "sft" / "model", data.tokenizer, new_head=True, head=head)
        module = RewardModule(model, data.tokenizer, optimizer=partial(adamw, lr=7e-4), head_lr=None)
        trainer = make_trainer(
            accelerator="cpu", max_epochs=1, gradient_clip_val=1.0, logger=False, enable_progress_bar=False
        )
        begun = time.perf_counter()
        trainer.fit(module, datamodule=data)
        seconds = time.perf_counter() - begun
        trainer.validate(module, datamodule=data, verbose=False)
        gold, held_out = (module.figures()[key] for key in ("gold_accuracy", "val_accuracy"))
        print(f"  {name:8} gold {gold:.3f}  held out {held_out:.3f}  {seconds:.0f} s")


def main() -> None:
    """Parse the arguments and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run, runs/quickstart say")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--train", action="store_true", help="also compare what is learned (some minutes)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = loaded(arguments.run, arguments.seed, arguments.run / "data" / "rankings-0.jsonl", PROMPTS)
    compare_time(arguments.run, data, arguments.repetitions)
    if arguments.train:
        with tempfile.TemporaryDirectory() as folder:
            compare_learning(arguments.run, arguments.seed, Path(folder))


if __name__ == "__main__":
    main()
