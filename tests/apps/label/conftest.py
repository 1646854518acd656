import json
import socket
from pathlib import Path

import pytest

from lit_rlhf.apps.label import LabellingPage


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path):
    """The records of a file; none where it is not there."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def answers(prompts=10, k=4):
    """Answers whose text says how good they are: "quality 3" is better than "quality 1"; their order is mixed."""
    return [
        {
            "prompt": [{"role": "user", "content": f"Question {n}?"}],
            "responses": [f"Answer to {n}, quality {(i * 7 + n) % k}" for i in range(k)],
            "round": 0,
            "model": "sft",
            "kind": "fact",
        }
        for n in range(prompts)
    ]


@pytest.fixture
def files(tmp_path):
    """write(path, rows) and read(path) of JSON lines, and answers(prompts, k)."""

    class Files:
        folder = tmp_path / "data"
        write, read, answers = staticmethod(write), staticmethod(read), staticmethod(answers)

    return Files


@pytest.fixture
def serve(tmp_path, files, served):
    """Serve a page in a thread of this process: serve(rows, **settings) -> its address."""
    from lit_rlhf.apps.label.web import make_app
    from lit_rlhf.apps.server import Guard, PageServer

    running = []

    def start(rows, port=0, **settings):
        path = rows if isinstance(rows, Path) else write(tmp_path / "source.jsonl", rows)
        page = LabellingPage(path, files.folder, **{"repeat": 0.0, **settings})
        labelling = page.labelling()
        server = PageServer("label", port=port)
        served(Guard(make_app(labelling, page.about()), server), server)
        running.append(labelling)
        return server.address

    yield start
    for labelling in running:
        labelling.close()


@pytest.fixture
def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
