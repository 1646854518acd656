"""The built-in world: a small made-up language with facts, questions, a gold judge and a simulated labeler."""

from lit_rlhf.text.world.grading import Grade
from lit_rlhf.text.world.labeler import SimulatedLabeler
from lit_rlhf.text.world.questions import Message
from lit_rlhf.text.world.tasks import TaskName
from lit_rlhf.text.world.world import World, WorldPrompt, world_fingerprint

__all__ = ["Grade", "Message", "SimulatedLabeler", "TaskName", "World", "WorldPrompt", "world_fingerprint"]
