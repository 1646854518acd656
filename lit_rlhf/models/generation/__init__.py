"""The rollout engine."""

from lit_rlhf.models.generation.engine import Growing, answer, generate, stream
from lit_rlhf.models.generation.sampling import Responses, Sampling
from lit_rlhf.models.generation.trunk import Trunk

__all__ = ["Growing", "Responses", "Sampling", "Trunk", "answer", "generate", "stream"]
