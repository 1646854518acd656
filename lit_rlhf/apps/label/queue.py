"""Queues and judgements of the labelling page, without the page itself.

The files are the only memory. What a person sees next follows from the items, the settings and the person's own events
so far, so a page that is loaded again, or a server that is started again, goes on where it was."""

from __future__ import annotations

import hashlib
import math
import random
import threading
import time
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lit_rlhf.apps.label.modes import Item, Task
from lit_rlhf.apps.record_file import RecordFile
from lit_rlhf.errors import UserError
from lit_rlhf.text.records import text_of

REPEAT_AFTER = 8  # other judgements, at least, before an item is shown again
AWAY = 900.0  # seconds after which an item on a person's screen is no longer kept for them
OWN = {"item", "turn", "annotator"}  # fields of every record of the page; chat's records, say, have no item
RECENT = 20  # judgements that the speed is measured on


class Labelling:
    """The items, each person's queue through them, and the files of judgements.

    ``<file>-<round>.jsonl`` holds one record for each item and person; others (chat) may write there too, and what they
    wrote is left as it is. ``aside-<file>-<round>.jsonl`` holds what is no record to train on: skipped items, second
    judgements of repeated items, and what was undone. Each step of a person changes one of the two, so that no step can
    be half done. Methods may be called from several threads.

    Args:
        items: what is to be judged; equal ones count once.
        task: what is asked.
        folder: where the files are; a second page for the same files is refused.
        round: part of the files' names.
        seed: of the order of items and answers, which differ from person to person.
        repeat: share of the items that a person gets again.
        people_per_item: an item is done when so many people have judged it; None: everyone judges everything.
    """

    def __init__(
        self,
        items: Sequence[Item],
        task: Task,
        folder: Path,
        *,
        round: int = 0,
        seed: int = 0,
        repeat: float = 0.0,
        people_per_item: int | None = None,
    ) -> None:
        self.items = {item.id: item for item in items}
        self.task, self.seed, self.people_per_item = task, seed, people_per_item
        self.repeat = repeat if task.can_repeat else 0.0
        name = f"{task.file}-{round}.jsonl"
        self._lock = threading.RLock()
        self.judged, self.aside = RecordFile(folder / name), RecordFile(folder / f"aside-{name}")
        self._alone = _only_page(folder / f".{name}.page.lock")
        try:
            known = [event for file in (self.judged, self.aside) for event in file.read() if event.keys() >= OWN]
        except UserError:
            self._alone.release()
            raise
        self._on_screen: dict[str, tuple[str, float]] = {}  # person -> item, when
        self._orders: dict[str, list[str]] = {}
        self._undone: list[dict[str, Any]] = []
        self._events: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for event in known:
            (self._undone if event.get("aside") == "undone" else self._events[event["annotator"]]).append(event)
        for events in self._events.values():
            events.sort(key=lambda event: event["turn"])

    def close(self) -> None:
        """Let another process have the files."""
        self._alone.release()

    @property
    def records(self) -> list[dict[str, Any]]:
        """Records judged on the page and not taken back, to train on."""
        return [event for events in self._events.values() for event in events if "aside" not in event]

    @property
    def annotators(self) -> list[str]:
        """Names of those who have judged something."""
        return sorted(name for name, events in self._events.items() if events)

    def state(self, annotator: str, message: str | None = None) -> dict[str, Any]:
        """The state of the page for one person."""
        with self._lock:
            annotator = person_name(annotator)
            item, again, left = self._next(annotator)
            events = self._events[annotator]
            done = sum(not _is_repeat(event) for event in events)
            agreed, compared = self._self_agreement(annotator)
            return {
                "annotator": annotator,
                "item": None if item is None else self._page_item(annotator, item, again),
                "turn": events[-1]["turn"] if events else 0,
                "judged": sum("aside" not in event for event in events),
                "skipped": sum(event.get("aside") == "skipped" for event in events),
                "done": done,
                "total": done + left,
                "per_hour": _per_hour(events),
                "agreed": agreed,
                "compared": compared,
                "message": message,
            }

    def judge(
        self, annotator: str, item: str, again: bool, verdict: Any, note: str = "", seconds: float = 0.0
    ) -> dict[str, Any]:
        """Keep a judgement; returns the next state. The same item is judged once, however often it is sent.

        Raises ``ValueError`` for a verdict that says nothing, ``UserError`` where it cannot be kept."""
        with self._lock:
            annotator = person_name(annotator)
            known = self._item(item)
            shown = self._shown(annotator, known, again)
            said = self.task.record(known, shown, verdict)
            if earlier := self._event(annotator, item, again):
                same = "shown" in earlier and self.task.verdict(earlier) == self.task.verdict({**said, "shown": shown})
                return self.state(annotator, None if same else "That one was done in another window; here is the next")
            self._check_first(annotator, item, again)
            event = {**said, **self._about(annotator, known, note, seconds), "shown": shown, **known.others}
            self._keep({**event, "aside": "repeated", "again": True} if again else event)
            return self.state(annotator)

    def skip(self, annotator: str, item: str, again: bool, note: str = "", seconds: float = 0.0) -> dict[str, Any]:
        """Leave an item unjudged; it does not come back."""
        with self._lock:
            annotator = person_name(annotator)
            known = self._item(item)
            if not self._event(annotator, item, again):
                self._check_first(annotator, item, again)
                about = self._about(annotator, known, note, seconds)
                self._keep({**about, "aside": "skipped", "again": again})
            return self.state(annotator)

    def undo(self, annotator: str, turn: int) -> dict[str, Any]:
        """Take back the person's last step if it is still number ``turn``; its item is shown again as it was judged."""
        with self._lock:
            annotator = person_name(annotator)
            events = self._events[annotator]
            if not events or turn == 0:
                return self.state(annotator, "There is nothing to undo")
            if events[-1]["turn"] == turn:
                event = events[-1]
                # Nothing a person wrote is thrown away; a copy that was set aside counts for nothing else.
                undone = {**event, "aside": "undone", "again": _is_repeat(event)}
                self.aside.append(undone)
                (self.aside if "aside" in event else self.judged).remove(event)
                self._undone.append(undone)
                events.pop()
            return self.state(annotator)

    def _keep(self, event: dict[str, Any]) -> None:
        (self.aside if "aside" in event else self.judged).append(event)
        self._events[event["annotator"]].append(event)

    def _next(self, annotator: str) -> tuple[Item | None, bool, int]:
        """(item, whether it is a repeated one, how many are left to judge a first time)."""
        events = self._events[annotator]
        seen = {event["item"] for event in events if not _is_repeat(event)}
        repeated = {event["item"] for event in events if _is_repeat(event)}
        taken = self._taken(annotator)
        waiting = [i for i in self._order(annotator) if i not in seen and i not in taken]
        chosen = self._chosen_again(annotator)
        for place, event in enumerate(events):
            due = "aside" not in event and event["item"] in chosen and event["item"] not in repeated
            if due and event["item"] in self.items and (len(events) - place > REPEAT_AFTER or not waiting):
                return self.items[event["item"]], True, len(waiting)
        if not waiting:
            self._on_screen.pop(annotator, None)
            return None, False, 0
        self._on_screen[annotator] = waiting[0], time.monotonic()
        return self.items[waiting[0]], False, len(waiting)

    def _order(self, annotator: str) -> list[str]:
        """The items in the person's own order, in which new items do not move the old ones."""
        if annotator not in self._orders:
            self._orders[annotator] = sorted(self.items, key=lambda i: self._digest("order", annotator, i))
        return self._orders[annotator]

    def _chosen_again(self, annotator: str) -> set[str]:
        """The items that the person gets twice: evenly spread through the order."""
        order = self._order(annotator)
        return {order[int(n / self.repeat)] for n in range(int(len(order) * self.repeat))}

    def _taken(self, annotator: str) -> set[str]:
        """The items that others have judged, or have before them, as often as is asked."""
        if self.people_per_item is None:
            return set()
        others: dict[str, set[str]] = defaultdict(set)
        now = time.monotonic()
        for name, (item, since) in self._on_screen.items():
            if now - since < AWAY:
                others[item].add(name)
        for record in self.records:
            others[record["item"]].add(record["annotator"])
        return {item for item, names in others.items() if len(names - {annotator}) >= self.people_per_item}

    def _shown(self, annotator: str, item: Item, again: bool) -> list[int]:
        """Which response stands in each place, for this person and time."""
        places = list(range(len(item.responses)))
        random.Random(self._digest("answers", annotator, item.id, again)).shuffle(places)
        return places

    def _page_item(self, annotator: str, item: Item, again: bool) -> dict[str, Any]:
        return {
            "id": item.id,
            "again": again,
            "prompt": [{"role": message["role"], "content": text_of(message)} for message in item.prompt],
            "tools": item.others.get("tools"),
            "answers": [item.responses[i] for i in self._shown(annotator, item, again)],
            "before": self._before(annotator, item.id, again),
        }

    def _before(self, annotator: str, item: str, again: bool) -> dict[str, Any] | None:
        """What the person had said of the item before taking it back."""
        for event in reversed(self._undone):
            if (event["annotator"], event["item"], _is_repeat(event)) == (annotator, item, again):
                # A skip that was undone said nothing.
                return {"verdict": self.task.verdict(event), "note": event["note"]} if "shown" in event else None
        return None

    def _about(self, annotator: str, item: Item, note: str, seconds: float) -> dict[str, Any]:
        f"{note}".encode()  # half a character (ValueError) could not be written
        if not math.isfinite(seconds):  # JSON has no name for it
            raise ValueError(f"seconds={seconds}: a number was expected")
        events = self._events[annotator]
        return {
            "annotator": annotator,
            "note": note.strip(),
            "seconds": round(min(max(float(seconds), 0.0), 86400.0), 1),
            "item": item.id,
            "turn": events[-1]["turn"] + 1 if events else 1,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _item(self, item: str) -> Item:
        if item not in self.items:
            raise ValueError("this item is no longer among those to judge; load the page again")
        return self.items[item]

    def _check_first(self, annotator: str, item: str, again: bool) -> None:
        if again and not self._event(annotator, item, False):
            raise ValueError("this item was not judged a first time")

    def _event(self, annotator: str, item: str, again: bool) -> dict[str, Any] | None:
        found = (e for e in self._events[annotator] if e["item"] == item and _is_repeat(e) == again)
        return next(found, None)

    def _self_agreement(self, annotator: str) -> tuple[int, int]:
        """(judged alike, compared) over the person's repeated items."""
        events = self._events[annotator]
        first = {event["item"]: event for event in events if "aside" not in event}
        again = [event for event in events if event.get("aside") == "repeated" and event["item"] in first]
        pairs = [self.task.agreement(first[event["item"]], event) for event in again]
        return sum(agreed for agreed, _ in pairs), sum(compared for _, compared in pairs)

    def _digest(self, *parts: Any) -> str:
        return hashlib.sha256(repr((self.seed, *parts)).encode()).hexdigest()


def person_name(name: str) -> str:
    """A name that is one person's, however it was typed; ``ValueError`` where it is none."""
    name = unicodedata.normalize("NFC", " ".join(name.split()))
    if not 1 <= len(name) <= 60 or not name.isprintable():
        raise ValueError("a name of 1 to 60 letters is needed")
    return name


def _is_repeat(event: dict[str, Any]) -> bool:
    return event.get("again", False)


def _per_hour(events: list[dict[str, Any]]) -> float | None:
    """Judgements per hour, by the last ones; None before there are any."""
    seconds = [event["seconds"] for event in events if event.get("aside") != "skipped"][-RECENT:]
    return 3600 * len(seconds) / sum(seconds) if sum(seconds) > 0 else None


def _only_page(path: Path) -> FileLock:
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{path.parent}: another labelling page writes there already; use that one (several people can), or give "
            "another label.round"
        ) from None
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written ({error.strerror}); choose another paths.runs=") from None
    return lock
