"""Judge by script while what keeps the judgements is killed at random moments, by SIGKILL, and count what is on disk.

    python benchmarks/judgements.py --judgements 10000 --kills 80

The labelling page in each mode, and chat: two people, each in two windows. A window goes on until its server tells it
that a judgement is kept. Lost: told so, and not on disk after a kill, or otherwise than it was said. Doubled: on disk
twice. Exit code 0: there is neither."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx

PEOPLE, WINDOWS = ("ann", "bob"), 2
FILES = {"rank": "labels", "rate": "feedback", "write": "demonstrations"}
WORDS = {"[1, 2]": "A", "[2, 1]": "B", "[1, 1]": "tie"}
FIELDS = {"rank": "ranks", "rate": "rating", "write": "response"}

SERVER = """
import sys
from lit_rlhf.apps.label import LabellingPage
source, folder, mode, port = sys.argv[1:]
LabellingPage(source, folder, mode=mode, port=int(port), repeat=0.1).launch()
"""

# A person in one window of chat: of two answers A, B or a tie; of one a thumb, now and then the other one after it.
CHATTER = """
import random, sys
from lit_rlhf.apps.chat import Conversation, Judgements, load_assistant
from lit_rlhf.errors import UserError
from lit_rlhf.rollouts import Sampling
from lit_rlhf.text import Transcript
folder, models, person, first, last = sys.argv[1:]
assistants = [load_assistant(name, f"{models}/{name}", Transcript()) for name in ("a", "b")]
for n in range(int(first), int(last)):
    draw = random.Random(f"{person} {n}")
    talk = Conversation(assistants[: 1 + n % 2], Judgements(folder, annotator=person), sampling=Sampling(4), seed=n)
    for _ in talk.ask(f"{person} {n}"):
        pass
    for said in draw.sample(["A", "B", "tie"], 1) if talk.compares else draw.sample([1, -1], draw.choice([1, 2])):
        print("says", n, said, flush=True)
        try:
            done = talk.choose(said) if talk.compares else talk.rate(said)
        except UserError as error:
            done = str(error)
        print("kept" if done.startswith("kept") else "nothing", n, said, flush=True)
"""


class Counts(NamedTuple):
    """What a trial found."""

    judgements: int
    kills: int
    lost: int
    doubled: int


def rows(file: Path) -> list[dict[str, Any]]:
    """Records of a file, but for a last line that is not whole."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_bytes().rpartition(b"\n")[0].splitlines()]


class Labellers:
    """Two people with two windows each, who judge all items of a labelling page."""

    def __init__(self, folder: Path, mode: str, items: int, seed: int) -> None:
        self.folder, self.mode, self.seed = folder, mode, seed
        self.source, self.port = folder / "answers.jsonl", 0
        answers = [
            {"responses": [f"Yes, {n}", f"No, {n}"]} if mode == "rank" else {"response": f"{n}"} for n in range(items)
        ]
        lines = [json.dumps({"prompt": f"Question {n}?", **answer}) + "\n" for n, answer in enumerate(answers)]
        self.source.write_text("".join(lines))
        self.kept: set[tuple[str, str, bool]] = set()  # (person, item, whether again) of which the server said so
        self.guard = threading.Lock()
        self.server = self.start()

    def start(self) -> subprocess.Popen[str]:
        """The server, listening: on a port of its choice, and from then on on that."""
        command = [sys.executable, "-c", SERVER, str(self.source), str(self.folder), self.mode, str(self.port)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        said = server.stdout.readline() if server.stdout else ""
        self.port = int(said.partition("http://127.0.0.1:")[2].partition(";")[0])
        return server

    def verdict(self, person: str, item: dict[str, Any]) -> Any:
        """What a person thinks of an item, now and later."""
        draw = random.Random(f"{person} {item['id']}")
        if self.mode == "write":
            return f"{person} on {item['id']}: {draw.random()}"
        if self.mode == "rate":
            return draw.choice([-1, 1])
        best = draw.choice(sorted(item["answers"]))
        return [1 if answer == best else 2 for answer in item["answers"]]

    def sit(self, person: str, window: int) -> None:
        """Judge until there is nothing more, now and then taking the last one back."""
        draw, state = random.Random(f"{self.seed} {person} {window}"), None
        with httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30) as client:
            while state is None or state["item"]:
                if state is None:
                    state = self.ask(lambda: client.get("/api/state", params={"annotator": person}))
                    continue
                item = state["item"]
                if draw.random() < 0.03:
                    back = {"annotator": person, "turn": state["turn"]}
                    state = self.ask(lambda back=back: client.post("/api/undo", json=back))
                    continue
                step = {"annotator": person, "item": item["id"], "again": item["again"]}
                step["verdict"] = self.verdict(person, item)
                state = self.ask(lambda step=step: client.post("/api/judge", json=step))
                if state:
                    with self.guard:
                        self.kept.add((person, item["id"], item["again"]))

    def ask(self, request: Callable[[], httpx.Response]) -> dict[str, Any] | None:
        """The next state, however often the server has to be asked; None where the page has to look again."""
        while True:
            try:
                answer = request()
                return answer.json() if answer.status_code == 200 else None
            except httpx.HTTPError:
                time.sleep(0.02)

    def on_disk(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Records to train on, and those aside."""
        name = f"{FILES[self.mode]}-0.jsonl"
        return rows(self.folder / name), rows(self.folder / f"aside-{name}")

    def lost_and_doubled(self) -> tuple[int, int]:
        """What is not on disk though it was said to be, and what is there twice."""
        with self.guard:
            kept = set(self.kept)
        judged, aside = self.on_disk()
        here = [(r["annotator"], r["item"], False) for r in judged]
        repeated = [(r["annotator"], r["item"], True) for r in aside if r["aside"] == "repeated"]
        undone = {(r["annotator"], r["item"], r["again"]) for r in aside if r["aside"] == "undone"}
        lost = len(kept - {*here, *repeated, *undone})
        return lost, sum(count - 1 for count in Counter(here + repeated).values())


def label(folder: Path, mode: str, judgements: int, kills: int, seed: int) -> Counts:
    """The page in a mode under kills, until everybody has judged everything."""
    items = max(1, round(judgements / len(PEOPLE) / (1.0 if mode == "write" else 1.1)))
    people = Labellers(folder, mode, items, seed)
    draw, done, lost, doubled = random.Random(seed), 0, 0, 0
    windows = [threading.Thread(target=people.sit, args=(p, w), daemon=True) for p in PEOPLE for w in range(WINDOWS)]
    for window in windows:
        window.start()
    while any(window.is_alive() for window in windows):
        if done < kills and len(people.kept) >= judgements * (done + draw.random()) / kills:
            time.sleep(draw.uniform(0, 0.1))
            people.server.kill()
            people.server.wait()
            done += 1
            found = people.lost_and_doubled()
            lost, doubled = lost + found[0], doubled + found[1]
            people.server = people.start()
        time.sleep(0.02)
    people.server.kill()
    people.server.wait()
    found = people.lost_and_doubled()
    judged, aside = people.on_disk()
    missing = len(PEOPLE) * items - len({(r["annotator"], r["item"]) for r in judged})
    shown = ({"id": r["item"], "answers": r.get("responses")} for r in judged)
    otherwise = sum(r[FIELDS[mode]] != people.verdict(r["annotator"], item) for r, item in zip(judged, shown))
    repeated = sum(r["aside"] == "repeated" for r in aside)
    return Counts(len(judged) + repeated, done, lost + found[0] + missing + otherwise, doubled + found[1])


def tiny_models(folder: Path) -> None:
    """Two models that say anything."""
    import torch

    from lit_rlhf.models import policy_from_config, save_model
    from lit_rlhf.text import ensure_chat_template, train_bpe

    config = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        tokenizer = train_bpe(["What is 12 + 30? It is 42.", "Who are you? I am the cat."] * 3, 300)
        ensure_chat_template(tokenizer)
        save_model(policy_from_config(config, tokenizer), tokenizer, folder / name)


class Window:
    """A window of chat: a process of its own, which writes to the files of all."""

    def __init__(self, folder: Path, models: Path, person: str, first: int, last: int) -> None:
        self.arguments, self.next, self.last = [str(folder), str(models), person], first, last
        self.person, self.said = person, {}  # number of the message -> [(word, what)]
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Go on with what comes next."""
        command = [sys.executable, "-c", CHATTER, *self.arguments, str(self.next), str(self.last)]
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 - read when the process has ended
        return subprocess.Popen(command, stdout=self.output, stderr=subprocess.DEVNULL)

    def read(self) -> None:
        """What the process said before it ended; what it was about when it was killed is not said again."""
        self.output.seek(0)
        for line in self.output.read().decode().split("\n")[:-1]:
            word, number, what = line.split()
            self.said.setdefault(int(number), []).append((word, what))
            self.next = int(number) + 1
        self.output.close()


def chat(folder: Path, judgements: int, kills: int, seed: int) -> Counts:
    """Windows of chat under kills; each goes on with the next message."""
    tiny_models(folder / "models")
    each = judgements // (len(PEOPLE) * WINDOWS)
    places = [(person, w * each, (w + 1) * each) for person in PEOPLE for w in range(WINDOWS)]
    windows = [Window(folder, folder / "models", *place) for place in places]
    draw, done = random.Random(seed), 0
    while running := [window for window in windows if window.process.poll() is None]:
        time.sleep(draw.uniform(0.5, 1.5))
        window = draw.choice(running)
        if done < kills and window.output.seek(0, 2):  # it has begun to talk
            window.process.kill()
            window.process.wait()
            window.read()
            window.process = window.start()
            done += 1
    for window in windows:
        window.read()
    found = rows(folder / "labels-0.jsonl") + rows(folder / "feedback-0.jsonl")
    here: dict[str, list[Any]] = defaultdict(list)
    for record in found:
        here[record["prompt"][-1]["content"]].append(WORDS.get(str(record.get("ranks")), str(record.get("rating"))))
    lost = doubled = 0
    for window in windows:
        for number, said in window.said.items():
            there = here.pop(f"{window.person} {number}", [])
            kept = [what for word, what in said if word == "kept"]
            allowed = {*kept[-1:], *(what for word, what in said[-1:] if word == "says")}
            lost += (bool(kept) and not there) or not allowed.issuperset(there)
            doubled += max(0, len(there) - 1)
    return Counts(len(found), done, lost, doubled + len(here))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judgements", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    share, total = (asked.judgements // 4, asked.kills // 4), Counts(0, 0, 0, 0)
    for mode in (*FILES, "chat"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            found = chat(path, *share, asked.seed) if mode == "chat" else label(path, mode, *share, asked.seed)
        total = Counts(*map(sum, zip(total, found)))
        print(f"{mode}: {found}", flush=True)
    print(f"all: {total}")
    sys.exit(bool(total.lost or total.doubled))


if __name__ == "__main__":
    main()
