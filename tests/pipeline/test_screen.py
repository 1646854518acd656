"""The end of a run on the terminal."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from lit_rlhf.apps.report.screen import print_screen
from lit_rlhf.files import write_yaml


@pytest.fixture
def run(finished_run, tmp_path, monkeypatch):
    shutil.copytree(
        finished_run / "runs/quickstart", tmp_path / "runs/quickstart", ignore=lambda *_: {"model", "checkpoints"}
    )
    monkeypatch.chdir(tmp_path)
    return Path("runs/quickstart")


def printed(run, **settings):
    console = Console(record=True, width=100, **settings)
    print_screen(run, console)
    return console.export_text()


def test_answers_figures_and_commands_of_a_run_stand_on_one_screen(run, lit_rlhf):
    text = printed(run)
    tables, _, _ = text.partition("what to try next")
    assert text.count("\n") < 60 and max(map(len, tables.splitlines())) <= 100
    assert re.search(r"held-out prompt +Base +SFT +PPO", text) and re.search(r"Gold grade +\S+ +\S+ +\S+ *\n", text)
    commands = re.findall(r"lit-rlhf (.*?)  # ", text)
    assert len(commands) == 3
    for command in commands:  # each is accepted; a sweep cannot be asked for its settings, but a job of it can
        command = re.sub(r"^-m | ?,[\d.,]+", "", command)
        assert "run" in lit_rlhf(*shlex.split(command), "--cfg", "job", fast=False).stdout


def test_a_sweep_stays_with_prompts_of_ones_own(run):
    config = run / "ppo" / "config.yaml"
    settings = yaml.safe_load(config.read_text())
    settings["ppo"]["data"]["path"] = "my prompts.jsonl"
    write_yaml(config, settings)
    commands = re.findall(r"lit-rlhf (.*?)  # ", printed(run))
    assert len(commands) == 2 and "ppo/data=jsonl 'ppo.data.path=my prompts.jsonl' ppo.module.kl_coef" in commands[1]


def test_texts_of_any_kind_fit_and_nothing_of_them_is_a_command_to_the_terminal(run):
    samples = run / "evaluate/samples.jsonl"
    answer = {"greedy": "", "samples": ["[red]我是一只猫[/red] 🐈 \x1b[31m" * 40], "scores": None, "grades": None}
    sample = {"prompt": "שלום", "kind": "", "models": dict.fromkeys(("base", "sft", "ppo"), answer)}
    samples.write_text(json.dumps(sample) + "\n", encoding="utf-8")
    text = printed(run)
    assert "[red]我是一只猫[/red] 🐈 \\x1b[31m" in re.sub(r"\s+", " ", text) or "[red]我" in text
    assert "\x1b" not in text and "…" in text


def test_a_run_without_a_comparison_has_none(run):
    shutil.rmtree(run / "evaluate")
    assert printed(run) == ""
