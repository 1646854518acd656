"""Commands of README, docs and studies run, beside the files that their pages speak of, at debug sizes; so does what
the program says to run next.

CI runs those blocks of code in which people have their say, or one command goes on from another's; all are run by
``LIT_RLHF_TEST_COMMANDS=all python -m pytest tests/pipeline/test_documented_commands.py``."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
import urllib.request

import places
import pytest
from hydra.types import RunMode
from judge_server import JudgeServer, completion
from test_readme import PAGES, ROOT, STUDIES, commands_by_block, text_of

from lit_rlhf.pipeline.run_folder import register_resolvers
from lit_rlhf.pipeline.settings import hydra_settings, opened

ALL = os.environ.get("LIT_RLHF_TEST_COMMANDS") == "all"
ELSEWHERE = {  # what a command needs that is not here
    "trainer=gpu": "a GPU",
    "trainer.accelerator=gpu": "GPUs",
    "trainer=ddp": "several processes: test_ddp.py",
    "trainer=fsdp": "several processes: test_sharded.py",
    "trainer.requeue=true": "Slurm: test_signals.py",
    "evaluate.benchmark.tasks=[arc_easy]": "a download",
    "evaluate.benchmark.include_path=my_tasks": "task files: test_harness.py",
    "reward_bench.data.path=rewardbench.jsonl": "a benchmark: test_reward_bench.py",
}
BUDGET = re.compile(r"(.*\.(?:max_steps|limit_train_batches|val_check_interval))=\d+")
SIZES = ["pretrain.trainer.max_steps=2", "ppo.trainer.limit_train_batches=1"]  # of studies, which have their own
WAITS = re.compile(r"Rank them with stage=label|In Label Studio make a project")
BLOCKS = [
    (f"{page.stem}-{number}", block)
    for page in [*PAGES, *STUDIES]
    for number, block in enumerate(commands_by_block(text_of(page)))
]


def in_small(arguments):
    """A command with budgets of a step or two, and of each list of a sweep the first value, of the first list two."""
    if "--help" in arguments:
        return arguments
    register_resolvers()
    overrides = [word for word in opened(arguments) if "=" in word]
    given = dict(word.split("=", 1) for word in overrides)
    more = [f"{found[1]}=2" for word in overrides if (found := BUDGET.fullmatch(word))]
    study = any(name in given for name in ("experiment", "sweep"))
    settings, swept = hydra_settings(overrides) if study else None, given
    if "-m" in arguments or (settings is not None and settings.mode == RunMode.MULTIRUN):
        swept = {**(settings.sweeper.params if settings is not None and settings.sweeper.params else {}), **given}
        lists = {
            key: value.split(",")
            for key, value in swept.items()
            if "," in str(value) and str(value)[0] not in "[{" and "(" not in str(value)
        }
        for number, (key, values) in enumerate(lists.items()):
            steps = BUDGET.fullmatch(f"{key}=0")
            more.append(f"{key}={'2' if steps else ','.join(values[: 1 if number else 2])}")
    more += ["hydra.sweeper.n_trials=2"] * ("optuna" in " ".join(arguments))
    more += [size for size in SIZES if study and size.partition("=")[0] not in swept]
    last = max((i for i, word in enumerate(arguments) if "=" in word), default=-1) + 1
    return [*arguments[:last], "debug=fast", "logger=csv", "callbacks.progress_bar=false", "threads=1", *more,
            *arguments[last:]]  # fmt: skip


@pytest.fixture
def place(lit_rlhf, finished_run, tmp_path):
    judge = JudgeServer(lambda request: (200, said_by_servers(request), {}))
    yield Place(lit_rlhf, finished_run / "runs" / "quickstart", tmp_path / "here", judge.url)
    judge.close()


def said_by_servers(request):
    """A verdict, a rating, or a score for each answer, as it was asked."""
    asked = json.loads(request.body)
    if "responses" in asked:
        return json.dumps({"scores": [float(len(text)) for text in asked["responses"]]}).encode()
    return completion("7" if "Your rating" in asked["messages"][-1]["content"] else "A")


class Place:
    """A folder in which commands are run one after the other."""

    def __init__(self, lit_rlhf, finished, folder, judge):
        self.lit_rlhf, self.folder, self.judge, self.count = lit_rlhf, folder, judge, 0
        self.env = {**lit_rlhf.env, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/pipeline/outside'}"}
        folder.mkdir()
        places.furnish(folder, finished, ROOT)

    def run(self, arguments):
        """Run a command as the page has it, or the program said it; what that says to run next is run, too."""
        self.provide(arguments)
        begun = time.monotonic()
        small, self.count = in_small(arguments), self.count + 1
        small += [
            f"{stage}.annotator.url={self.judge}"
            for stage in ("preference", "evaluate")
            if f"{stage}/annotator=llm_judge" in arguments
        ]
        for stage in ("ppo", "evaluate"):
            if f"{stage}/reward_model=llm_judge" in arguments:
                small.append(f"{stage}.reward_model.url={self.judge}")
        small = [re.sub(r"http://127.0.0.1:8001(?=/score)", self.judge, word) for word in small]
        if "stage=label" in arguments or "chat.ui=web" in arguments:
            said = self.serve(small)
        else:
            own = any("copycat" in word for word in arguments)
            done = self.lit_rlhf(*small, fast=False, check=False, cwd=self.folder, env=self.env if own else None)
            said = done.stdout + done.stderr
            assert done.returncode == 0 or WAITS.search(said), f"{shlex.join(small)}\n{said[-2000:]}"
        print(f"{time.monotonic() - begun:.1f} s: {shlex.join(small)}", flush=True)
        followed = [[shlex.split(command)] for command in re.findall(r"to go on: lit-rlhf (.*)", said)]
        if ALL and "Rank them with stage=label (the rest of the command as it is)" in said:
            rest = [word for word in arguments if not word.startswith("stage=")]
            followed.append([[*rest, "stage=label"], arguments])
        for commands in followed:
            aside = self.folder.with_name(f"{self.folder.name}-{self.count}")
            shutil.copytree(self.folder, aside, symlinks=True)
            here, self.folder = self.folder, aside
            for command in commands:
                self.run(command)
            self.folder = here
        return said

    def provide(self, arguments):
        """Put where it belongs what a command reads of other runs, or has from people."""
        runs = self.folder / "runs"
        if "preference.annotator.export=export.json" in arguments:
            without = [word for word in arguments if "export=" not in word]
            if not (tasks := [*runs.glob("*/data/label_studio_tasks-0.json")]):
                self.run(without)
                tasks = [*runs.glob("*/data/label_studio_tasks-0.json")]
            (self.folder / "export.json").write_text(json.dumps(places.judged(json.loads(tasks[0].read_text()))))
        for word in arguments:
            key, _, value = word.partition("=")
            if key == "from_run" and not (runs / value).exists():
                (runs / value).symlink_to("quickstart")
            if value.startswith("runs/") and not (self.folder / value).exists():
                (self.folder / value).parent.mkdir(parents=True, exist_ok=True)
                if value.endswith("/model"):
                    (self.folder / value).symlink_to(runs / "quickstart" / (self.folder / value).parent.name / "model")
                    continue
                kind = "answers" if "answers" in value else "rankings"
                shutil.copy(runs / "quickstart" / "data" / f"{kind}-0.jsonl", self.folder / value)

    def serve(self, arguments):
        """Start a page, judge all there is where it is one for that, and end it by Ctrl-C."""
        port = free_port()
        command = [*self.lit_rlhf.command()[:3], *arguments]
        command += [f"{'label' if 'stage=label' in arguments else 'chat'}.port={port}"]
        process = subprocess.Popen(command, cwd=self.folder, env=self.env, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        address = f"http://127.0.0.1:{port}"
        try:
            wait_for(address, process)
            if "stage=label" in arguments:
                judge_all(address)
        finally:
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=60)[0]
        assert process.returncode in (0, 130), said  # as Ctrl-C meets it serving, or on its way there
        return said


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait_for(address, process):
    deadline = time.monotonic() + 120
    while True:
        try:
            return ask(address)
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
            time.sleep(0.1)


def ask(address, body=None):
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(address, data, {"Content-Type": "application/json"})) as reply:
        return reply.read()


def judge_all(address):
    """Rank the answers to every prompt as they stand."""
    state = json.loads(ask(f"{address}/api/state?annotator=ann"))
    while state["item"] is not None:
        item = state["item"]
        step = {"annotator": "ann", "item": item["id"], "again": item["again"]}
        verdict = [*range(1, len(item["answers"]) + 1)]
        state = json.loads(ask(f"{address}/api/judge", {**step, "verdict": verdict}))


IN_TURN = re.compile(r"stage=(label|chat)|annotator=(none|people)|classify.data.task=same|checkpoint-1,checkpoint-2")
CHOSEN = [
    pytest.param(block, id=name) for name, block in BLOCKS if ALL or any(IN_TURN.search(" ".join(c)) for c in block)
]


@pytest.mark.slow
@pytest.mark.parametrize("block", CHOSEN)
def test_commands_of_a_block_run_one_after_the_other(block, place):
    for arguments in block:
        if not set(arguments) & ELSEWHERE.keys():
            place.run(arguments)
