"""What the commands of README and docs find where their pages say that they are run: files, models, a judge."""

import json
import shutil
from pathlib import Path

ADDITIONS = [(a, b) for a in range(3, 9) for b in range(2, 7)]
ASKED = [f"What is {a} plus {b}?" for a, b in ADDITIONS]
TRUE = [f"{a} plus {b} is {a + b}." for a, b in ADDITIONS]
FALSE = [f"{a} plus {b} is {a * b + 1}, or so." for a, b in ADDITIONS]
TEXT = "\n\n".join(f"{asked}\n{true} So it is said." for asked, true in zip(ASKED, TRUE)) * 4

DEMONSTRATIONS = [
    {"prompt": p, "response": r, "question": p, "info": {"answer": r}, "expected": r} for p, r in zip(ASKED, TRUE)
]
UNSEEN = [  # by those who learn from the files above and below: evaluation refuses what was trained on
    {"prompt": f"What is {a} plus {b}?", "expected": f"{a} plus {b} is {a + b}.", "info": {"answer": a + b}}
    for a, b in ((a, b + 5) for a, b in ADDITIONS)
]
INSTRUCTIONS = [
    {"instruction": p, "input": "", "output": r, "chosen": r, "rejected": f} for p, r, f in zip(ASKED, TRUE, FALSE)
]
PAIRS = [{"prompt": p, "chosen": r, "rejected": f} for p, r, f in zip(ASKED, TRUE, FALSE)]
DIALOGUES = [
    {side: f"\n\nHuman: {p}\n\nAssistant: {said}" for side, said in (("chosen", r), ("rejected", f))}
    for p, r, f in zip(ASKED, TRUE, FALSE)
]
LABELLED = [{"text": t, "label": label} for r, f in zip(TRUE, FALSE) for t, label in ((r, "true"), (f, "false"))]
TASKS = [
    {"data": {"prompt": asked["prompt"], "answer1": asked["expected"], "answer2": false}}
    for asked, false in zip(UNSEEN, FALSE)
]
LINES = {
    "prompts.jsonl": UNSEEN,
    "demonstrations.jsonl": DEMONSTRATIONS,
    "my.jsonl": DEMONSTRATIONS,
    "sums.jsonl": DEMONSTRATIONS,
    "general.jsonl": [{"text": text} for text in TEXT.split("\n\n")],
    "pairs.jsonl": PAIRS,
    "harmless-base.jsonl": DIALOGUES,
    "mine.jsonl": LABELLED,
}
LISTS = {
    "prompts.json": UNSEEN,
    "demonstrations.json": DEMONSTRATIONS,
    "instructions.json": INSTRUCTIONS,
    "instruction-data.json": INSTRUCTIONS,
    "instruction-data-with-preference.json": INSTRUCTIONS,
    "pairwise-tasks.json": [task["data"] for task in TASKS],
}
TEXTS = ["book.txt", "input.txt", "old.txt", "shakespeare.txt", "lines.txt"]
MODELS = ["my-checkpoint", "SmolLM2", "gpt2", "my-gpt2", "gpt2-tokenizer", "checkpoint-1", "checkpoint-2"]


def furnish(folder: Path, finished: Path, root: Path) -> None:
    """Make of a folder the place where the commands of a page are run."""
    shutil.copytree(finished, folder / "runs" / "quickstart")
    for name, rows in LINES.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rows in LISTS.items():
        (folder / name).write_text(json.dumps(rows))
    for name in TEXTS:
        (folder / name).write_text(TEXT)
    for name in MODELS:
        (folder / name).symlink_to(finished / "sft" / "model")
    classifier(folder / "my-classifier", finished / "sft" / "model")
    for name in "abc":
        (folder / name).symlink_to(finished)
    for name in ("pairwise-export.json", "export.json"):
        (folder / name).write_text(json.dumps(judged(TASKS)))
    (folder / "my_rewards.py").write_text(
        "def right_sum(prompts, responses, finished, expected, **_):\n"
        "    return [float(said == wanted) for said, wanted in zip(responses, expected)]\n"
    )
    own = folder / "my_conf" / "preference" / "annotator" / "mine.yaml"
    own.parent.mkdir(parents=True)
    shutil.copy(root / "conf" / "preference" / "annotator" / "world.yaml", own)


def classifier(folder, like):
    """A classifier of two labels, with the tokenizer of a model."""
    from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(like)
    tokenizer.chat_template = None
    sizes = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 256}
    sizes |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    GPT2ForSequenceClassification(GPT2Config(num_labels=2, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def judged(tasks):
    """An export of Label Studio, of people who always want the first answer."""
    first = {"type": "pairwise", "from_name": "comparison", "to_name": "comparison", "value": {"selected": "left"}}
    return [
        {"id": i, **task, "annotations": [{"id": i, "completed_by": 1, "result": [first], "was_cancelled": False}]}
        for i, task in enumerate(tasks)
    ]
