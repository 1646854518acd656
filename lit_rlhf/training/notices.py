"""Warnings and log lines of libraries, and which of them a person should see."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import transformers

import lit_rlhf


def one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as it stands on the terminal: of ours the sentence alone, of others where it comes from, too."""
    ours = Path(filename).is_relative_to(Path(lit_rlhf.__file__).parent)
    sentence = " ".join(str(message).split())
    return f"{sentence}\n" if ours else f"{filename}:{lineno}: {category.__name__}: {sentence}\n"


def quiet() -> None:
    """Keep the libraries' chatter off the terminal, or out of a notebook; each filter states its cause.

    Our own warnings are lines."""
    warnings.formatwarning = one_line
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)  # hardware tables and tips, repeated for every stage
    transformers.logging.set_verbosity_error()  # "newly initialized" heads, which are meant
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # kernels of 4-bit weights, sought as peft is imported
    for notice in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.filterwarnings("ignore", category=notice)  # of libraries to those who call them: to us, not to a user
    for message in (
        "does not have many workers",  # batches are made faster than workers start
        "GPU available but not used",  # the default runs on a CPU on purpose
        "in eval mode at the start of training",  # PPO trains without dropout
        "isinstance.treespec, LeafSpec",  # Lightning's use of torch's pytree
        "recommended to use .self.log",  # figures are gathered from all processes before they are logged
        "smaller than the logging interval",  # validation is logged all the same
        "anonymous",  # Lightning passes it, W&B will drop it
        "lr_scheduler.step.*optimizer.step",  # Lightning wraps the optimizer
    ):
        warnings.filterwarnings("ignore", message=f".*{message}.*")
