"""PPO-ptx: pretraining text beside the answers, so that the policy does not forget it (InstructGPT, eq. 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from lightning import Trainer
from torch import Generator, Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.models.gathering import full
from lit_rlhf.models.text_rows import TextRows, check_rows, text_loss
from lit_rlhf.training.all_processes import distributed_map


class PretrainingText(Protocol):
    """Text in rows, as the pretraining stage's data module has it."""

    entries: Sequence[Any]  # where it comes from; empty: there is none
    block_size: int  # tokens per row

    def setup(self) -> None:
        """Read the text."""
        ...

    def rows(self, count: int, generator: Generator) -> TextRows:
        """``count`` rows to train on, drawn from ``generator``."""
        ...

    def val_dataloader(self) -> Iterable[TextRows]:
        """A loader of held-out rows."""
        ...


def pretraining_text(
    make: Callable[..., PretrainingText] | None, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PretrainingText:
    """The text of the language-modelling term, read.

    Raises ``UserError`` where there is none, and where its rows do not fit into the policy's context."""
    text = None if make is None else make(tokenizer=tokenizer)
    if text is None or not text.entries:
        raise UserError(
            "ptx_coef (ppo.module) is above 0 and there is no pretraining text to mix in: give ptx, in the command as "
            "ppo.ptx.path=... (a .txt file, or records with a field text)"
        )
    text.setup()
    check_rows(policy, text.block_size, "ppo.ptx.block_size")
    return text


def text_gradients(
    policy: PreTrainedModel, parts: Sequence[TextRows], coef: float, backward: Callable[[Tensor], None]
) -> Tensor:
    """Adds ``coef`` times the gradients of the mean loss on ``parts`` to those there are; ``backward`` takes a loss.

    Returns that mean, in nats per token."""
    total = torch.zeros((), device=parts[0].labels.device)
    for part in parts:
        loss = text_loss(policy, part) * (part.labels.numel() / sum(p.labels.numel() for p in parts))
        backward(coef * loss)
        total += loss.detach()
    return total


@torch.no_grad()
def held_out_text_loss(
    policy: PreTrainedModel, text: PretrainingText, device: torch.device, trainer: Trainer
) -> Tensor:
    """Mean loss on the held-out pretraining text, in nats per token; processes share it out."""
    batches = list(text.val_dataloader())
    losses = distributed_map(trainer, batches, lambda rows: text_loss(policy, rows.to(device)) * rows.labels.numel())
    return torch.stack(losses).sum() / sum(rows.labels.numel() for rows in batches)


def gradient_norm(model: PreTrainedModel, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """Norm of the gradients that were gathered so far; ``mean`` is one over the processes. Those of sharded models are
    means already."""
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return full(torch.nn.utils.get_total_norm([g if isinstance(g, DTensor) else mean(g) for g in found]))
