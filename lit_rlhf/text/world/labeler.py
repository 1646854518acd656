"""A simulated person who ranks answers: knows the gold grade, is noisy, and may like long answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

from lit_rlhf.text.world.questions import Message, conversation_text
from lit_rlhf.text.world.world import World


class SimulatedLabeler:
    """Ranks answers by Plackett-Luce: utility = gold + length_bias * words, plus Gumbel noise of scale `temperature`.

    temperature: in gold points; 0 ranks by utility alone; length_bias: gold points per word. The noise depends on the
    seed, the prompt, the answer and its place among the answers only, so a collection that is resumed ranks alike."""

    def __init__(self, world: World, temperature: float = 0.55, length_bias: float = 0.0, seed: int = 0) -> None:
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}: give 0 (no noise) or more, in gold points.")
        self.world = world
        self.temperature = temperature
        self.length_bias = length_bias
        self.seed = seed

    def __call__(self, prompts: Sequence[Sequence[Message]], responses: Sequence[Sequence[str]]) -> list[list[int]]:
        """K answers to each prompt -> their K ranks: 1 = best, no rank left out, the same text twice ties."""
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts came with answers to {len(responses)}: give one list per prompt.")
        return [self.rank(prompt, answers) for prompt, answers in zip(prompts, responses, strict=True)]

    def rank(self, prompt: Sequence[Message] | str, answers: Sequence[str]) -> list[int]:
        """The ranks of the answers to one prompt."""
        utility: dict[str, float] = {}
        for position, answer in enumerate(answers):
            if answer not in utility:
                utility[answer] = self._utility(prompt, answer, position)
        order = sorted(utility.values(), reverse=True)
        return [order.index(utility[answer]) + 1 for answer in answers]

    def _utility(self, prompt: Sequence[Message] | str, answer: str, position: int) -> float:
        key = prompt if isinstance(prompt, str) else conversation_text(prompt)
        uniform = Random(f"{self.seed}\n{key}\n{position}\n{answer}").random()
        gumbel = -math.log(-math.log(max(uniform, 1e-12)))
        liked = self.world.grade(prompt, answer).gold + self.length_bias * len(answer.split())
        return liked + self.temperature * gumbel
