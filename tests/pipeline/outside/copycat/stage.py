"""What runs: a LightningModule and a LightningDataModule, with what the pipeline asks of them (stages/contract.py)."""

from pathlib import Path
from typing import Annotated, Any

import torch
from lightning import LightningDataModule, LightningModule
from pydantic import Field
from torch.utils.data import DataLoader

from lit_rlhf.models import save_model
from lit_rlhf.text.records import Moved


class LinesDataModule(LightningDataModule):
    """The lines of a file; each is its own prompt, and an empty one is none."""

    long, how_long = 0, ""

    def __init__(self, path: str, tokenizer: Any) -> None:
        super().__init__()
        self.path, self.tokenizer = path, tokenizer
        self.moved, self.tell, self.skipped = Moved(), print, []

    def setup(self, stage: str | None = None) -> None:
        lines = Path(self.path).read_text(encoding="utf-8").splitlines()
        self.lines = [line for line in lines if line.strip()]
        self.skipped = [f"{self.path}:{i}: no text" for i, line in enumerate(lines, 1) if not line.strip()]
        self.tokens = [torch.tensor(self.tokenizer(line)["input_ids"]) for line in self.lines]

    def sizes(self) -> dict[str, int]:
        return {"train_set": len(self.lines)}

    def for_module(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer, "lines": self.lines}

    def trained_prompts(self) -> list[list[dict[str, str]]]:
        return [[{"role": "user", "content": line}] for line in self.lines]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.tokens)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.tokens)


class CopycatModule(LightningModule):
    def __init__(self, policy: Any, tokenizer: Any, lines: list[str], *, lr: Annotated[float, Field(gt=0)]) -> None:
        super().__init__()
        self.policy, self.tokenizer, self.lines, self.lr = policy, tokenizer, lines, lr

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.policy(input_ids=batch, labels=batch).loss
        self.log("copycat/loss", loss)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/copycat/loss", self.policy(input_ids=batch, labels=batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.policy.parameters(), self.lr)

    def write_samples(self) -> list[tuple[str, str]]:
        return [(line, "as it was") for line in self.lines[:1]]

    def figures(self) -> dict[str, Any]:
        return {"val_loss": self.trainer.callback_metrics["val/copycat/loss"].item()}

    def export(self, folder: Path) -> None:
        save_model(self.policy, self.tokenizer, folder / "model")
