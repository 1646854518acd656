"""Judgements under SIGKILL; `python benchmarks/judgements.py` keeps ten thousand."""

import threading
from pathlib import Path

import judgements
import pytest


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(judgements.__file__).parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["rate", "write", "chat"])  # rank: in the browser, tests/apps/label
def test_a_kill_loses_and_doubles_nothing(tmp_path, mode):
    if mode == "chat":
        found = judgements.chat(tmp_path, 16, 1, seed=0)
    else:
        found = judgements.label(tmp_path, mode, 24, 1, seed=0)
    assert found.judgements >= 12 and found.kills == 1
    assert (found.lost, found.doubled) == (0, 0)


def test_what_is_lost_or_doubled_is_counted(tmp_path):
    people = judgements.Labellers(tmp_path, "rate", items=3, seed=0)
    windows = [threading.Thread(target=people.sit, args=(person, 0)) for person in judgements.PEOPLE]
    for window in windows:
        window.start()
    for window in windows:
        window.join(60)
    people.server.kill()
    people.server.communicate()
    file = tmp_path / "feedback-0.jsonl"
    whole = file.read_text().splitlines(keepends=True)
    assert len(whole) == 6 and people.lost_and_doubled() == (0, 0)
    file.write_text("".join(whole[1:]))
    assert people.lost_and_doubled() == (1, 0)
    file.write_text("".join([*whole, whole[2]]))
    assert people.lost_and_doubled() == (0, 1)
