"""Which share of this machine's matrix-product rate our stages reach.

    python benchmarks/peak.py [--cases "pretraining, S"] [--threads 1 2]

The peak is what ``torch.mm`` reaches in float32 with its defaults and as many threads, in turns with the stage. Of the
stage only useful operations count, by the formula of ``workload.Shape.forward_flops``: nothing for padding, for
masked attention, or for logits that no loss needs. PPO's optimization is all epochs over a rollout; decoding is a
rollout at full length, prompts included."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ppo
import torch
from harness import OURS, Check, EndLap, Laps, Work, clock, interleave, main
from trl_comparison.ours import prompt_data
from users import CONSTANT, OPTIMIZER, fit
from workload import SHAPES, Shape, make_models, prompts, write_text

from lit_rlhf.models import load_policy
from lit_rlhf.rollouts import Sampling, generate
from lit_rlhf.stages import PPOModule, PretrainDataModule, PretrainModule
from lit_rlhf.text import load_tokenizer

WARMUP = 2
MATRIX, PRODUCTS = 1024, 20  # rows and columns of the peak's matrices; products a lap


@dataclass(frozen=True)
class Case:
    stage: Literal["pretraining", "PPO optimization", "decoding"]
    shape: str
    laps: int
    batch: int = 64  # rows or answers; PPO's settings are those of ppo.py
    length: int = 64  # tokens per row, or of an answer at most
    activation: str = "gelu_new"  # of the checkpoint


CASES = {
    "pretraining, S": Case("pretraining", "S", 15, batch=16, length=128, activation="gelu_pytorch_tanh"),
    "pretraining, L": Case("pretraining", "L", 6, batch=16, length=128, activation="gelu_pytorch_tanh"),
    "PPO optimization, S": Case("PPO optimization", "S", 4),
    "PPO optimization, L": Case("PPO optimization", "L", 2),
    "decoding, S": Case("decoding", "S", 8),
    "decoding, L": Case("decoding", "L", 3),
}


class TimedPPO(PPOModule):
    """Knows when its rollout was ready, and what it was."""

    def collect(self, *arguments: Any) -> Any:
        self.rollout, statistics = super().collect(*arguments)
        self.collected = clock()
        return self.rollout, statistics

    def useful_flops(self, shape: Shape) -> int:
        """Of all epochs over the rollout: policy and critic, forward and backward."""
        total = 0
        for sequence, answer in zip(self.rollout.sequences, self.rollout.lengths.tolist()):
            tokens = len(sequence) - 1  # nothing is asked of the last one
            total += shape.forward_flops(tokens, logits=answer) + shape.forward_flops(tokens)
        return 3 * self.ppo_epochs * total


def measure(case: Case, threads: int, laps: int) -> tuple[Laps, list[Check]]:
    steps, shape = laps + WARMUP, SHAPES[case.shape]
    like = ppo.Case(case.shape, early=case.stage == "PPO optimization", laps=laps, new_tokens=case.length)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy, reward_model = make_models(shape, folder, like.end_chance, case.activation)
        tokenizer = load_tokenizer(policy)

        def pretraining(end_lap: EndLap) -> None:
            text = write_text(folder / "text.txt", (steps + 2) * case.batch * (case.length + 1) * 10 // 9)
            data = PretrainDataModule(str(text), tokenizer, block_size=case.length, batch_size=case.batch)
            module = PretrainModule(load_policy(policy), tokenizer, optimizer=OPTIMIZER, schedule=CONSTANT)
            flops = 3 * case.batch * shape.forward_flops(case.length, logits=case.length)
            fit(module, data, steps, end_lap, lambda *_: {"amount": flops / 1e9})

        def optimization(end_lap: EndLap) -> None:
            def amount(module: Any, _: Any) -> dict[str, Any]:
                return {"amount": module.useful_flops(shape) / 1e9, "since": module.collected}

            fit(
                ppo.our_module(like, policy, reward_model, tokenizer, kind=TimedPPO),
                prompt_data(prompts(steps * case.batch), tokenizer, case.batch), -1, end_lap, amount, max_epochs=1,
                log_every_n_steps=1, limit_train_batches=steps, gradient_clip_val=None,
            )  # fmt: skip

        def decoding(end_lap: EndLap) -> None:
            model = load_policy(policy, tokenizer).eval()
            ends = {"eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}
            for number in range(steps):
                batch = prompts(case.batch, number)
                begun = clock()
                answers = generate(model, batch, Sampling(case.length), **ends)
                lengths = zip(map(len, batch), answers.lengths.tolist())
                flops = sum(shape.forward_flops(prompt + n - 1, logits=n) for prompt, n in lengths)
                end_lap(flops / 1e9, since=begun)

        def mm(end_lap: EndLap) -> None:
            a, b = torch.randn(2, MATRIX, MATRIX)
            for _ in range(steps):
                for _ in range(PRODUCTS):
                    torch.mm(a, b)
                end_lap(2 * PRODUCTS * MATRIX**3 / 1e9)

        side = {"pretraining": pretraining, "PPO optimization": optimization, "decoding": decoding}[case.stage]
        return interleave({OURS: side, "torch.mm": mm}, laps, WARMUP, threads), []


WORK = Work("peak", "GFLOP/s", CASES, measure)

if __name__ == "__main__":
    main(WORK, __doc__)
