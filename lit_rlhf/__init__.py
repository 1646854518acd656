"""lit_rlhf: from a raw language model to a chat assistant, as PyTorch Lightning components."""

__version__ = "0.1.0"
