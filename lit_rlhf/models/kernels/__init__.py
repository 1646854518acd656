"""All that only makes models faster, on a CPU or a GPU: the same functions of the same weights, to rounding.

``trainer.kernels=plain`` computes everything by transformers' own modules, with logits of some tokens at a time as ever
(``models/chunked.py``, which is for memory); docs/kernels.md says what each file does."""

from lit_rlhf.models.kernels.allocator import keep_freed_memory
from lit_rlhf.models.kernels.attention import use_block_attention
from lit_rlhf.models.kernels.choice import Kernels, fast_kernels, use_kernels
from lit_rlhf.models.kernels.layers import use_fast_layers

__all__ = ["Kernels", "fast_kernels", "keep_freed_memory", "use_block_attention", "use_fast_layers", "use_kernels"]
