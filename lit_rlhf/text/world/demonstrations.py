"""What people showed the model: mostly right answers, many with faults that later stages can remove."""

from __future__ import annotations

from random import Random

from lit_rlhf.text.world.answers import Answers
from lit_rlhf.text.world.questions import Question

STYLES = {  # style: percent of the demonstrations
    "good": 21,  # right and polite
    "plain": 37,  # right
    "wrong": 14,  # false, off topic or harmful
    "ramble": 11,  # right, and one or two sentences too many
    "rude": 9,  # right and rude
    "evasive": 6,  # "I do not know."
    "refuse": 2,  # refuses without need; gives harmful advice where there is need
}


def demonstrate(answers: Answers, question: Question, rng: Random) -> dict[str, object]:
    """One demonstration: prompt (messages), response, kind and style."""
    say = {
        "good": answers.polite,
        "plain": answers.right,
        "wrong": answers.wrong,
        "ramble": answers.rambling,
        "rude": answers.rude,
        "evasive": answers.evasive,
        "refuse": answers.refusal,
    }
    style = rng.choices(list(STYLES), weights=list(STYLES.values()))[0]
    response = say[style](question.meaning, rng)
    return {"prompt": list(question.messages), "response": response, "kind": question.kind, "style": style}
