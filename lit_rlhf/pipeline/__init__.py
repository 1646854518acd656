"""The command: the only layer that imports Hydra."""

from lit_rlhf.pipeline.command import main

__all__ = ["main"]
