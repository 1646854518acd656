"""The rollout engine."""

from lit_rlhf.models.generation.decoder import LeanDecoder
from lit_rlhf.models.generation.engine import Growing, answer, answer_texts, fitted, generate, rows_that_fit, stream
from lit_rlhf.models.generation.sampling import Engine, Responses, Sampling
from lit_rlhf.models.generation.trunk import Trunk
from lit_rlhf.models.generation.vllm import VLLMEngine

__all__ = [
    "Engine",
    "Growing",
    "LeanDecoder",
    "Responses",
    "Sampling",
    "Trunk",
    "VLLMEngine",
    "answer",
    "answer_texts",
    "fitted",
    "generate",
    "rows_that_fit",
    "stream",
]
