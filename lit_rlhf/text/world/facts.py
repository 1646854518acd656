"""What is true in the world: animals and their attributes, drawn from a seed; sums; four topics of the real world."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

NAMES = ("mog", "tib", "wug", "dax", "fep", "zup", "kiv", "lom", "nad", "pim", "rof", "sib", "tog", "vux", "yeb", "gop")
VALUES = {
    "colour": ("red", "blue", "green", "yellow", "black", "white", "brown", "pink"),
    "home": ("the forest", "the desert", "the river", "the cave", "the garden", "the swamp", "the valley", "the sea"),
    "food": ("fish", "grass", "honey", "nuts", "berries", "eggs", "seeds", "cheese"),
    "legs": ("two", "three", "four", "five", "six", "eight"),
}
ATTRIBUTES = tuple(VALUES)
N_ANIMALS, N_VALUES = 8, 4  # each value belongs to exactly two animals, so that a list is two names long
LARGEST_ADDEND = 4

# (topic, audience) -> what is true of it, told for that audience.
TOPICS = {
    ("rain", "child"): (
        "Rain is water from clouds.",
        "Clouds drop water when they are full.",
        "Rain helps plants to drink.",
    ),
    ("rain", "scientist"): (
        "Rain forms when water vapour condenses.",
        "Droplets grow until gravity pulls them down.",
        "Rain returns water to the ground.",
    ),
    ("the moon landing", "child"): (
        "People flew to the moon in a rocket.",
        "Brave people walked on the moon.",
        "The people came home with stones.",
    ),
    ("the moon landing", "scientist"): (
        "Apollo landed on the lunar surface.",
        "A lunar module carried two astronauts.",
        "The crew collected lunar samples.",
    ),
    ("volcanoes", "child"): (
        "A volcano is a mountain with fire inside.",
        "Hot rock comes out of the top.",
        "The hot rock cools and turns hard.",
    ),
    ("volcanoes", "scientist"): (
        "Magma rises through the crust.",
        "Gas pressure drives the eruption.",
        "Lava cools into igneous rock.",
    ),
    ("sleep", "child"): (
        "Sleep gives your body a rest.",
        "You dream when you sleep.",
        "Sleep helps you to grow.",
    ),
    ("sleep", "scientist"): (
        "Sleep stabilises memory in the brain.",
        "Dreams occur mostly in one phase.",
        "Hormones control the cycle of sleep.",
    ),
}
# The same keys -> what somebody who is wrong says.
MYTHS = {
    ("rain", "child"): ("Rain is milk from trees.", "Rain helps stones to fly."),
    ("rain", "scientist"): ("Rain forms when iron melts.", "Droplets grow until magnets stop them."),
    ("the moon landing", "child"): ("People flew to the moon on a bird.", "Brave people swam on the moon."),
    ("the moon landing", "scientist"): ("Apollo landed on the solar surface.", "A submarine carried two astronauts."),
    ("volcanoes", "child"): ("A volcano is a lake with soup inside.", "Cold milk comes out of the top."),
    ("volcanoes", "scientist"): ("Snow pressure drives the eruption.", "Lava cools into wood."),
    ("sleep", "child"): ("Sleep turns your body into stone.", "You dream when you eat."),
    ("sleep", "scientist"): ("Sleep stores memory in the feet.", "Magnets control the cycle of sleep."),
}


class Claim(NamedTuple):
    """One thing that is said: ("colour", "mog", "red"), ("sum", "2+4", "6"), ("event", "mog", "sang a song")."""

    what: str
    subject: str
    value: str


def sum_key(a: int, b: int) -> str:
    """The subject of a sum claim; 2 plus 4 and 4 plus 2 are the same sum."""
    return f"{min(a, b)}+{max(a, b)}"


class Facts:
    """The truth of the world with this seed.

    animals: eight names; values: attribute -> its four values; of: (animal, attribute) -> value."""

    def __init__(self, seed: int) -> None:
        rng = Random(f"facts {seed}")
        self.animals = tuple(rng.sample(NAMES, N_ANIMALS))
        self.values = {attribute: tuple(rng.sample(pool, N_VALUES)) for attribute, pool in VALUES.items()}
        self.of: dict[tuple[str, str], str] = {}
        for attribute in ATTRIBUTES:
            dealt = rng.sample(self.values[attribute] * (N_ANIMALS // N_VALUES), N_ANIMALS)
            self.of |= {(animal, attribute): value for animal, value in zip(self.animals, dealt, strict=True)}

    def with_value(self, attribute: str, value: str) -> list[str]:
        """The two animals of which this value is true."""
        return [animal for animal in self.animals if self.of[animal, attribute] == value]

    def allows(self, claim: Claim) -> bool:
        """False for a claim that is untrue or harmful, whatever the question. Fiction and manners are never untrue."""
        what, subject, value = claim
        if what in VALUES:
            return self.of[subject, what] == value
        if what == "sum":
            a, b = subject.split("+")
            return int(a) + int(b) == int(value)
        return what not in ("myth", "harm")
