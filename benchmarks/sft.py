"""Supervised fine-tuning, ours against the newest TRL's SFTTrainer: without packing, and packed ("wrapped").

Models of a checkpoint's size (135M) are also compared with a bare padded loop, in float32 and in bfloat16.

    python benchmarks/sft.py [--cases "S, TRL packed"] [--threads 1 2]

Makes an environment of its own with TRL. Both learn the same answers in the same order from the same weights. Our side
is the same in both cases but for its batch: rows without padding, in which no dialogue sees another. TRL's wrapped rows
are cut out of one stream, across dialogues, so there the losses are alike but not the same. A lap is a step."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from environment import NEWEST_TRL, enter

if __name__ == "__main__":
    enter(NEWEST_TRL)

from harness import OURS, Check, EndLap, Laps, Work, alike, interleave, main, vary
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM
from users import BETAS, BF16, CLIP, CONSTANT, FLOAT32, LR, OPTIMIZER, fit
from workload import SHAPES, chance, chat_tokenizer, make_models, write_answers

from lit_rlhf.models import load_policy
from lit_rlhf.stages import SFTDataModule, SFTModule

WARMUP = 10  # memory has grown to what is needed by then


@dataclass(frozen=True)
class Case:
    shape: str
    packed: bool  # TRL's side
    batch: int  # of ours, dialogues of 48 tokens on average
    laps: int  # steps
    row_length: int = 128  # tokens of TRL's packed row; ours stay whole, blocks of one length
    longest_answer: int = 64  # tokens
    activation: str = "gelu_new"  # of the checkpoint
    precision: str = FLOAT32
    peer: str = "TRL"  # or LOOP
    warmup: int = WARMUP

    @property
    def rows(self) -> int:
        """Of TRL's batch: dialogues, or as many packed rows as hold those of ours."""
        return round(self.batch * 48 / self.row_length) if self.packed else self.batch


LOOP = "padded loop"
CASES = {
    "S, TRL unpacked": Case("S", packed=False, batch=32, laps=30),
    "S, TRL packed": Case("S", packed=True, batch=85, laps=20),
    "135M, padded loop": Case("135M", packed=False, batch=8, laps=6, peer=LOOP, warmup=2),
    "135M, padded loop, bfloat16": Case("135M", packed=False, batch=8, laps=6, peer=LOOP, precision=BF16, warmup=2),
    "135M, TRL packed": Case("135M", packed=True, batch=8, laps=6, warmup=2),
    "135M, TRL packed, bfloat16": Case("135M", packed=True, batch=8, laps=6, precision=BF16, warmup=2),
}
SLOW = tuple(name for name in CASES if name.startswith("135M"))


def padded_loop(path: Path, examples: list[dict[str, Any]], case: Case, pad_id: int, end_lap: EndLap) -> None:
    """What people write by hand: transformers' model and loss on padded batches, AdamW, gradients clipped."""
    model = AutoModelForCausalLM.from_pretrained(path).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=0.0, fused=True)
    for i in range(0, len(examples) - case.batch + 1, case.batch):
        rows = examples[i : i + case.batch]
        tokens, labels, mask = (
            pad_sequence([torch.tensor(x) for x in column], batch_first=True, padding_value=fill)
            for column, fill in (
                ([row["input_ids"] for row in rows], pad_id),
                ([row["labels"] for row in rows], -100),
                ([[1] * len(row["input_ids"]) for row in rows], 0),
            )
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=case.precision == BF16):
            loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        end_lap(mask.sum().item(), learned=(labels[:, 1:] != -100).sum().item(), loss=loss.item())


def measure(case: Case, threads: int, laps: int) -> tuple[Laps, list[Check]]:
    steps = laps + case.warmup
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy, _ = make_models(SHAPES[case.shape], folder, activation=case.activation)
        records = (steps + 3) * case.batch * 10 // 9
        path = write_answers(folder / "answers.jsonl", records, 1, longest=case.longest_answer)
        tokenizer = chat_tokenizer()

        def data() -> SFTDataModule:
            return SFTDataModule(path, tokenizer, batch_size=case.batch)

        ready = data()
        ready.setup()
        examples = [
            {"input_ids": item.tokens, "labels": [t if m else -100 for t, m in zip(item.tokens, item.mask)]}
            for item in (ready.train_set[i] for i in ready.train_dataloader().order(0))
        ]

        def ours(end_lap: EndLap) -> None:
            module = SFTModule(load_policy(policy, tokenizer), tokenizer, optimizer=OPTIMIZER, schedule=CONSTANT)

            def amount(_: Any, parts: list[Any]) -> dict[str, float]:
                tokens = sum(part.packed.lengths.sum().item() for part in parts)
                return {"amount": tokens, "learned": sum(len(part.learned) for part in parts)}

            fit(module, data(), steps, end_lap, amount, precision=case.precision)

        def theirs(end_lap: EndLap) -> None:
            if case.peer == LOOP:
                return padded_loop(policy, examples, case, tokenizer.pad_token_id, end_lap)
            from trl import SFTConfig, SFTTrainer
            from trl_stage import train

            def amount(inputs: dict[str, Any]) -> dict[str, float]:
                tokens, learned = inputs["attention_mask"].sum(), (inputs["labels"][:, 1:] != -100).sum()
                return {"amount": tokens.item(), "learned": learned.item()}

            train(
                SFTTrainer, SFTConfig, AutoModelForCausalLM.from_pretrained(policy), tokenizer, examples, end_lap,
                amount, per_device_train_batch_size=case.rows, max_steps=steps, packing=case.packed,
                packing_strategy="wrapped", max_length=case.row_length if case.packed else None,
                bf16=case.precision == BF16,
            )  # fmt: skip

        found = interleave({OURS: ours, case.peer: theirs}, laps, case.warmup, threads)
    if case.packed:  # rates count tokens, so a step may have some more or fewer
        lengths = chance(laps * case.batch)
        return found, alike(found, amount=lengths, learned=lengths, loss=0.02)
    return found, alike(found, loss=1e-3 if case.precision == FLOAT32 else 0.01)


GROWTH = vary(CASES["S, TRL unpacked"], 6, batch=(8, 32, 128), longest_answer=(32, 64, 256), shape=("S", "M", "L"))
WORK = Work("sft", "tokens/s", CASES, measure, SLOW, GROWTH)

if __name__ == "__main__":
    main(WORK, __doc__)
