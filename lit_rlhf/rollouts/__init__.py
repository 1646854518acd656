"""Drawing responses from a policy: the engine's protocol, and engines."""

from lit_rlhf.rollouts.engine import (
    Ended,
    Engine,
    Request,
    Response,
    Responses,
    Sampling,
    draw_seeds,
    sample,
    side_by_side,
)
from lit_rlhf.rollouts.fast import FastEngine, Growing, answer_texts, fitted, generate, rows_that_fit, stream
from lit_rlhf.rollouts.transformers import TransformersEngine
from lit_rlhf.rollouts.vllm import VLLMEngine

__all__ = [
    "Ended",
    "Engine",
    "FastEngine",
    "Growing",
    "Request",
    "Response",
    "Responses",
    "Sampling",
    "TransformersEngine",
    "VLLMEngine",
    "answer_texts",
    "draw_seeds",
    "fitted",
    "generate",
    "rows_that_fit",
    "sample",
    "side_by_side",
    "stream",
]
