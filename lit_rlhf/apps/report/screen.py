"""The end of a run on the terminal: answers side by side, how the models compare, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lit_rlhf.apps.display import MEASURES, figure, model_name, printable
from lit_rlhf.apps.report import comparison
from lit_rlhf.apps.report.samples import answers
from lit_rlhf.apps.run_reader import Run, load_run, newest
from lit_rlhf.files import read_yaml
from lit_rlhf.stages.evaluate import STAGE as EVALUATE
from lit_rlhf.stages.ppo import STAGE as PPO
from lit_rlhf.stages.pretrain import STAGE as PRETRAIN
from lit_rlhf.stages.sft import STAGE as SFT

PROMPTS_SHOWN = 4
TEXT_SHOWN = 100  # characters of a text
MEASURES_SHOWN = ("gold", "correct", "right", "score", "kl")
RUNS = Path("runs")  # where runs are unless a command says otherwise
MARKS = {"good": "green", "bad": "red", "half": "yellow"}


def print_screen(folder: Path, console: Console | None = None) -> None:
    """Print what came out of a run whose models were compared; nothing of others.

    Args:
        folder: the run's.
        console: where to; None: the terminal.
    """
    run = load_run(folder)
    if run.of(EVALUATE).get("models") and run.samples.get(EVALUATE.name):
        console = console or Console()
        ours, theirs = comparison.compared(run)
        console.print(Group(*_screen(run, ours, theirs)))
        for line in next_commands(folder, ours, theirs, own_prompts(folder)):
            # To be copied: not broken where the terminal ends
            console.print(f"  {line}", soft_wrap=True, markup=False, highlight=False)
        console.print()


def print_warning(line: str) -> None:
    """Print a line in red; in a file, as it is."""
    Console().print(Text(line, "bold red"), soft_wrap=True)


def _screen(run: Run, ours: str, theirs: str) -> Iterator[RenderableType]:
    models = [name for name in run.of(EVALUATE)["models"] if name in (PRETRAIN.called, theirs, ours)]
    yield ""
    yield _answers(run, models, ours, theirs)
    yield _measures(run, models)
    if headline := comparison.headline(run):
        yield Text.assemble(headline.before, (headline.number, "bold"), headline.after)
        yield Text(headline.note, "dim")
    yield ""
    yield Text("what to try next", "bold")


def _answers(run: Run, models: list[str], ours: str, theirs: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, leading=1)
    table.add_column("held-out prompt", style="dim", ratio=3)
    for name in models:
        table.add_column(model_name(name), ratio=4)
    rows = answers(run.samples[EVALUATE.name], ours, theirs).rows
    kinds: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        kinds.setdefault(row.kind, []).append(place)
    turns = sorted((turn, place) for places in kinds.values() for turn, place in enumerate(places))
    for _, place in turns[:PROMPTS_SHOWN]:
        columns = {column.model: column for column in rows[place].columns}
        said = [Text(_cut(rows[place].dialogue[-1][1]))]
        table.add_row(*said, *(_answer(columns[name].first.text, columns[name].first.badges) for name in models))
    return table


def _answer(text: str, badges: list[tuple[str, str]]) -> Text:
    """The text behind a mark: right, wrong, or in between, where a judge knows."""
    kind, label = next(((kind, label) for kind, label in badges if kind), ("", ""))
    mark = label[:1] if label[:1] in "✓✗" else "~"
    return Text.assemble((f"{mark} " if kind else "", MARKS.get(kind, "")), _cut(text) or "(nothing)")


def _cut(text: str) -> str:
    text = str(printable(" ".join(text.split())))
    return text if len(text) <= TEXT_SHOWN else f"{text[: TEXT_SHOWN - 1]}…"


def _measures(run: Run, models: list[str]) -> Table:
    evaluation = run.of(EVALUATE)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"{evaluation['prompts']} held-out prompts", style="dim")
    for name in models:
        table.add_column(model_name(name), justify="right")
    for key in MEASURES_SHOWN:
        values = [evaluation["models"][name].get(key) for name in models]
        if any(value is not None for value in values):
            label, unit = MEASURES[key]
            table.add_row(label, *("" if value is None else figure(value, unit) for value in values))
    for versus in (SFT.called, PRETRAIN.called):
        wins = {w.ours: w for w in comparison.win_rates(run) if w.theirs == versus}
        if versus in models and wins.keys() & {*models}:
            cells = (f"{wins[name].mean:.0%}" if name in wins else "" for name in models)
            table.add_row(f"Wins against {model_name(versus)}", *cells)
    return table


def own_prompts(folder: Path) -> str:
    """The settings by which PPO of a run was given prompts of the user's own; "" where it had the world's."""
    settings = read_yaml(newest(folder, PPO.name) / "config.yaml").get(PPO.name) or {}
    path = (settings.get("data") or {}).get("path")
    return f"ppo/data=jsonl {shlex.quote(f'ppo.data.path={path}')} " if isinstance(path, str) else ""


def next_commands(folder: Path, ours: str, theirs: str, prompts: str = "") -> list[str]:
    """Commands that go on from a run, with what each is for; ``prompts``: its :func:`own_prompts`."""
    place = [] if folder.parent == RUNS else [f"paths.runs={folder.parent}"]
    commands = {
        f"stage=chat run={folder.name} chat.model={ours} chat.against={theirs}": "talk to both, blind",
        f"-m stage=ppo from_run={folder.name} {prompts}ppo.module.kl_coef=0.05,0.1,0.2": "a sweep: how far from SFT",
    }
    if not prompts:  # the ladder is about the world's
        commands[f"experiment=ladder from_run={folder.name}"] = "REINFORCE, RLOO, GRPO, PPO, DPO"
    lines = {" ".join(["lit-rlhf", command, *place]): what for command, what in commands.items()}
    width = max(map(len, lines))
    return [f"{line.ljust(width)}  # {what}" for line, what in lines.items()]
