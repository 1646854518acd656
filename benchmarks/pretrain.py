"""Our pretraining stage against a bare PyTorch loop over a model of nanoGPT's shape.

    python benchmarks/pretrain.py [--cases S] [--threads 1 2]

Both start from the same weights and see the same rows in the same order, so their losses are the same step by step.
The bare loop has its rows in memory, and no framework, no logging and no metrics; it reads its loss after each step,
as ours does."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import OURS, Check, EndLap, Laps, Work, alike, interleave, main, vary
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from users import BETAS, CLIP, CONSTANT, LR, OPTIMIZER, fit
from workload import SHAPES, VOCABULARY, Shape, chat_tokenizer, make_models, write_text

from lit_rlhf.models import load_policy
from lit_rlhf.stages import PretrainDataModule, PretrainModule

WARMUP = 3


@dataclass(frozen=True)
class Case:
    shape: str
    laps: int  # optimizer steps
    batch: int = 16  # rows
    length: int = 128  # tokens per row
    activation: str = "gelu_pytorch_tanh"  # as our configs of fresh models have it


CASES = {"S": Case("S", laps=40), "L": Case("L", laps=10)}


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.ln_1, self.ln_2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.qkv, self.out = nn.Linear(shape.width, 3 * shape.width), nn.Linear(shape.width, shape.width)
        self.up, self.down = nn.Linear(shape.width, 4 * shape.width), nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(self.ln_1(x)).split(width, 2)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.ln_2(x)), approximate="tanh"))


class BareGPT(nn.Module):
    """GPT-2, no more than training needs."""

    def __init__(self, shape: Shape, context: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, shape.width), nn.Embedding(context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of (B, T) labels."""
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    @classmethod
    def from_checkpoint(cls, path: Path, shape: Shape, context: int) -> BareGPT:
        """The same weights: transformers keeps GPT-2's matrices transposed."""
        names = {
            "wte": "tokens", "wpe": "places", "h": "blocks", "ln_f": "norm", "attn.c_attn": "qkv", "attn.c_proj": "out",
            "mlp.c_fc": "up", "mlp.c_proj": "down",
        }  # fmt: skip
        weights = {}
        for name, weight in AutoModelForCausalLM.from_pretrained(path).transformer.state_dict().items():
            transposed = ".c_" in name and name.endswith("weight")
            for old, new in names.items():
                name = f".{name}".replace(f".{old}.", f".{new}.")[1:]
            weights[name] = weight.T.contiguous() if transposed else weight
        model = cls(shape, context)
        model.load_state_dict(weights)
        return model


def measure(case: Case, threads: int, laps: int) -> tuple[Laps, list[Check]]:
    steps = laps + WARMUP
    with tempfile.TemporaryDirectory() as name:
        folder, shape, context = Path(name), SHAPES[case.shape], max(512, case.length)
        path, _ = make_models(shape, folder, activation=case.activation, context=context)
        text = write_text(folder / "text.txt", (steps + 2) * case.batch * (case.length + 1) * 10 // 9)
        tokenizer = chat_tokenizer()

        def data() -> PretrainDataModule:
            return PretrainDataModule(str(text), tokenizer, block_size=case.length, batch_size=case.batch)

        ready = data()
        ready.setup()
        rows = [(row.inputs.contiguous(), row.labels.contiguous()) for row in ready.train_dataloader()]

        def ours(end_lap: EndLap) -> None:
            module = PretrainModule(load_policy(path), tokenizer, optimizer=OPTIMIZER, schedule=CONSTANT)
            fit(module, data(), steps, end_lap, lambda _, parts: {"amount": sum(p.labels.numel() for p in parts)})

        def theirs(end_lap: EndLap) -> None:
            model = BareGPT.from_checkpoint(path, shape, context)
            decayed = [p for p in model.parameters() if p.dim() >= 2]
            others = [p for p in model.parameters() if p.dim() < 2]
            optimizer = torch.optim.AdamW(
                [{"params": decayed}, {"params": others}], lr=LR, betas=BETAS, weight_decay=0.0, fused=True
            )
            for tokens, labels in rows[:steps]:
                loss = model(tokens, labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                end_lap(labels.numel(), loss=loss.item())

        found = interleave({OURS: ours, "bare PyTorch": theirs}, laps, WARMUP, threads)
    last = [side[-1].watched["loss"] for side in found.values()]
    return found, [*alike(found, loss=1e-4), Check("last loss", *last, 1e-3)]


GROWTH = vary(CASES["S"], 8, batch=(4, 16, 64), length=(64, 128, 256), shape=("S", "M", "L"))
WORK = Work("pretrain", "tokens/s", CASES, measure, growth=GROWTH)

if __name__ == "__main__":
    main(WORK, __doc__)
