"""A reward model, ours against the newest TRL's RewardTrainer: on pairs, and on rankings of 6 answers.

    python benchmarks/reward.py [--cases "S, rankings of 6"] [--threads 1 2]

Makes an environment of its own with TRL. Both learn the same comparisons in the same steps from the same weights, and
have the same losses. Of a ranking of 6 answers our side reads each once, for its 15 pairs; TRL's has to be given the 15
pairs, all in one step, too. A lap is a step."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from environment import NEWEST_TRL, enter

if __name__ == "__main__":
    enter(NEWEST_TRL)

from harness import OURS, Check, EndLap, Laps, Work, alike, interleave, main, vary
from users import BF16, CONSTANT, FLOAT32, OPTIMIZER, fit
from workload import SHAPES, chat_tokenizer, make_models, write_answers

from lit_rlhf.models import load_reward_model
from lit_rlhf.stages import RewardDataModule, RewardModule

WARMUP = 2


@dataclass(frozen=True)
class Case:
    shape: str
    answers: int  # K to a prompt
    prompts: int  # a step
    laps: int  # steps
    longest_answer: int = 64  # tokens
    activation: str = "gelu_new"  # of the checkpoint
    precision: str = FLOAT32

    @property
    def comparisons(self) -> int:
        """Of a step."""
        return self.prompts * self.answers * (self.answers - 1) // 2


CASES = {
    "S, pairs": Case("S", answers=2, prompts=32, laps=20),
    "S, rankings of 6": Case("S", answers=6, prompts=4, laps=12),
    "135M, pairs": Case("135M", answers=2, prompts=8, laps=6),
    "135M, pairs, bfloat16": Case("135M", answers=2, prompts=8, laps=6, precision=BF16),
}
SLOW = tuple(name for name in CASES if name.startswith("135M"))


def measure(case: Case, threads: int, laps: int) -> tuple[Laps, list[Check]]:
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer
    from trl_stage import train

    steps = laps + WARMUP
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _, reward_model = make_models(SHAPES[case.shape], folder, activation=case.activation)
        records = max(20, (steps + 3) * case.prompts * 10 // 9)
        path = write_answers(folder / "rankings.jsonl", records, case.answers, longest=case.longest_answer)
        tokenizer = chat_tokenizer()

        def data() -> RewardDataModule:
            return RewardDataModule(path, tokenizer, batch_size=case.prompts)

        ready = data()
        ready.setup()
        pairs = [
            {"chosen_ids": item.sequences[i], "rejected_ids": item.sequences[j]}
            for item in (ready.train_set[i] for i in ready.train_dataloader().order(0))
            for i, j in combinations(range(case.answers), 2)  # they are ranked in their order
        ]

        def ours(end_lap: EndLap) -> None:
            model = load_reward_model(reward_model, tokenizer)
            module = RewardModule(model, tokenizer, optimizer=OPTIMIZER, schedule=CONSTANT, head_lr=None)
            fit(module, data(), steps, end_lap, lambda *_: {"amount": case.comparisons}, precision=case.precision)

        def theirs(end_lap: EndLap) -> None:
            def amount(inputs: dict[str, Any]) -> dict[str, float]:
                return {"amount": len(inputs["input_ids"]) // 2}

            model = AutoModelForSequenceClassification.from_pretrained(reward_model)
            train(
                RewardTrainer, RewardConfig, model, tokenizer, pairs, end_lap, amount,
                per_device_train_batch_size=case.comparisons, max_steps=steps, bf16=case.precision == BF16,
            )  # fmt: skip

        found = interleave({OURS: ours, "TRL": theirs}, laps, WARMUP, threads)
    # Rounding to bfloat16 alone moves the loss of a first step, of the same weights, by up to 2% on either side.
    return found, alike(found, loss=1e-3 if case.precision == FLOAT32 else 0.04)


GROWTH = vary(CASES["S, pairs"], 5, prompts=(8, 32, 64), longest_answer=(32, 64, 256), shape=("S", "M", "L")) | vary(
    CASES["S, rankings of 6"], 4, answers=(2, 4, 6, 9)
)
WORK = Work("reward", "comparisons/s", CASES, measure, SLOW, GROWTH)

if __name__ == "__main__":
    main(WORK, __doc__)
