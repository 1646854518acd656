"""What README and docs say is true: commands compose, code parses, CI runs the README's tests, links lead somewhere."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
import yaml
from hydra.types import RunMode
from omegaconf import OmegaConf
from packaging.requirements import Requirement

from lit_rlhf.pipeline.recipe import fitted_settings
from lit_rlhf.pipeline.run_folder import register_resolvers, remember_world
from lit_rlhf.pipeline.settings import check_settings, compose_settings, hydra_settings, opened, sweep_jobs
from lit_rlhf.stages.stage import all_stages

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STUDIES = sorted([*(ROOT / "conf/experiment").glob("*.yaml"), *(ROOT / "conf/sweep").glob("*.yaml")])


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)


def text_of(page: Path) -> str:
    """A page as it is read; of settings, their comments; of a notebook, what is not code."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        return "".join("".join(cell["source"]) + "\n\n" for cell in cells if cell["cell_type"] == "markdown")
    return text if page.suffix == ".md" else "".join(re.findall(r"^# ?(.*\n)", text, re.MULTILINE))


def commands_by_block(text: str = README) -> list[list[list[str]]]:
    """The arguments of each `lit-rlhf ...` in a page's blocks of code, of those that have any."""
    fenced = r"^ *```bash\n(.*?)^ *```"
    code = [a or b for a, b in re.findall(rf"{fenced}|((?:^ {{4}}[^\n]*\n)+)", text, re.DOTALL | re.MULTILINE)]
    lines = [[line.strip() for line in block.replace("\\\n", " ").splitlines()] for block in code]
    found = [[re.match(r"(?:until |srun )?lit-rlhf\b([^;]*)", line) for line in block] for block in lines]
    return [split for block in found if (split := [shlex.split(m[1], comments=True) for m in block if m])]


def commands(text: str = README) -> list[list[str]]:
    """The same in one list."""
    return [command for block in commands_by_block(text) for command in block]


def everywhere() -> list[list[str]]:
    """Those of all pages, notebooks and studies, each once."""
    pages = [*PAGES, *NOTEBOOKS, *STUDIES]
    return [list(c) for c in dict.fromkeys(tuple(c) for page in pages for c in commands(text_of(page)))]


def split_options(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """(options with their values, overrides)."""
    options, overrides, rest = {}, [], list(arguments)
    while rest:
        word = rest.pop(0)
        if word in ("--cfg", "--package", "--config-dir"):
            options[word] = rest.pop(0)
        elif word.startswith("-"):
            options[word] = ""
        else:
            overrides.append(word)
    return options, overrides


def test_there_are_commands():
    assert len(commands()) > 15
    assert [] in commands()  # the quickstart
    for file in STUDIES:
        assert ("lit-rlhf" in text_of(file)) == bool(commands(text_of(file))), file  # each in a line of its own


@pytest.mark.parametrize("arguments", everywhere(), ids=" ".join)
def test_command_composes(arguments, tmp_path, monkeypatch, request):
    """Settings exist and are of the right type and range; the files that a command names are placeholders."""
    monkeypatch.chdir(tmp_path)
    register_resolvers()
    options, overrides = split_options(opened(arguments))
    if any("copycat" in word for word in overrides):  # docs/stages.md's stage of another distribution
        monkeypatch.syspath_prepend(ROOT / "tests/pipeline/outside")
        all_stages.cache_clear()
        request.addfinalizer(all_stages.cache_clear)
    if "--config-dir" in options:  # the user's own annotator; the world's stands in for it
        own = tmp_path / options["--config-dir"] / "preference/annotator/mine.yaml"
        own.parent.mkdir(parents=True)
        own.write_text((ROOT / "conf/preference/annotator/world.yaml").read_text())
        overrides.append(f"hydra.searchpath=[file://{own.parent.parent.parent}]")
    if functions := re.findall(r"my_rewards\.(\w+)", " ".join(overrides)):  # the user's own reward functions
        (tmp_path / "my_rewards.py").write_text("".join(f"def {f}(prompts, responses): ...\n" for f in functions))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "my_rewards", raising=False)  # another test's
    study = any(word.startswith("experiment=") for word in overrides)
    swept = "-m" in options or (study and hydra_settings(overrides).mode == RunMode.MULTIRUN)
    jobs = sweep_jobs(overrides) if swept else [overrides]
    for job in jobs[:: max(len(jobs) - 1, 1)]:  # the first and the last
        cfg = fitted_settings(job)
        remember_world(cfg)
        check_settings(cfg)


def test_options_stand_before_overrides_where_hydra_wants_it():
    """Hydra's parser refuses overrides on both sides of an option; --cfg and --package may come last."""
    for arguments in everywhere():
        for option in ("-m", "--config-dir"):
            assert option not in arguments or arguments.index(option) == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_are_python(page):
    for source in blocks("python", page.read_text(encoding="utf-8")):
        ast.parse(textwrap.dedent(source))


def test_settings_of_the_migration_page_exist():
    cfg = compose_settings(["evaluate/data=jsonl", "sft/data=jsonl"])
    page = (ROOT / "docs/migrating.md").read_text(encoding="utf-8")
    addresses = set(re.findall(r"`((?:ppo|evaluate|chat|sft|dpo|logger|trainer|world|split|model)\.[\w.]+)", page))
    addresses = {
        address for address in addresses if not address.startswith(("model.optimizer", "model.sch", "model.net"))
    }
    assert len(addresses) > 50
    for address in addresses:
        above, _, name = address.rpartition(".")
        assert name in {*OmegaConf.select(cfg, above)}, address  # mandatory ones, too


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = text_of(page)
    targets = [t.split("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if not t.startswith("http")]
    for target in filter(None, targets):
        assert (page.parent / target).exists(), target


def test_two_commands_set_everything_up():
    """One for the main job, one for the tests; the latter between the marks that .ci/run looks for."""
    assert [block for block in blocks("bash") if block.startswith("make ")] == ["make quickstart\n", "make test\n"]
    marked = re.search(r"<!-- test command -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert marked and blocks("bash", marked[1]) == ["make test\n"]


def test_ci_runs_the_readmes_test_command(tmp_path):
    """The first lines of .ci/run read the command from the README; its last line runs it."""
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    head, _, rest = script.partition("export VENV")
    copy = tmp_path / ".ci/run"
    copy.parent.mkdir()
    copy.write_text(head + "printf '%s\\n' \"$tests\"\n")
    for page, code, read in [(README, 0, "make test\n"), ("no command", 1, "")]:
        (tmp_path / "README.md").write_text(page, encoding="utf-8")
        done = subprocess.run(["bash", str(copy)], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (code, read)
    assert rest.rstrip().splitlines()[-1] == 'eval "$tests"'
    assert script.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in script
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def make(*arguments, path=None):
    """What ``make`` prints for these arguments, with another folder of commands before the others."""
    inherited = {"MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "ARGS"}  # of the `make test` that runs this
    env = {name: value for name, value in os.environ.items() if name not in inherited}
    env["PATH"] = f"{path}:{env['PATH']}" if path else env["PATH"]
    command = ["make", "--no-print-directory", "-C", ROOT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout


@pytest.mark.parametrize(("target", "extras", "last"), [
    ("quickstart", '-e "."', "/bin/lit-rlhf"), ("test", '-e ".[dev]"', "/bin/python -m pytest"),
])  # fmt: skip
def test_make_sets_everything_up(tmp_path, target, extras, last):
    lines = make("-n", target, f"VENV={tmp_path}/env")
    assert f"-m venv {tmp_path}/env" in lines and "-m pip install" in lines and extras in lines
    assert lines.strip().splitlines()[-1].strip().endswith(last)
    (tmp_path / "uv").write_text("#!/bin/sh\n")
    (tmp_path / "uv").chmod(0o755)
    lines = make("-n", target, f"VENV={tmp_path}/env", path=tmp_path)
    assert "uv venv" in lines and "uv pip install" in lines and extras in lines and "-m venv" not in lines


def test_make_lists_its_targets():
    said = make()
    targets = re.search(r"^.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert all(f"make {target} " in said for target in targets)


def test_actions_of_the_workflow_are_pinned_by_commit_and_dependencies_are_checked():
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    used = re.findall(r"uses: (.*)", workflow)
    assert used and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action) for action in used)
    assert "pip-audit --strict --requirement constraints/cpu.txt" in workflow  # what cannot be looked up fails, too


def test_workflow_runs_the_same_tests_on_every_python():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    steps = [step.get("run", "") for step in jobs["tests"]["steps"]]
    assert "make test" in steps
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = [c.rpartition(" ")[2] for c in project["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert jobs["tests"]["strategy"]["matrix"]["python-version"] == versions


def test_constraints_pin_what_the_project_asks_for():
    lines = (ROOT / "constraints/cpu.txt").read_text().splitlines()
    pins = {
        r.name.lower(): r for r in map(Requirement, filter(None, (line.partition("#")[0].strip() for line in lines)))
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for wanted in map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["dev"]]):
        pin = pins[wanted.name.lower()]
        [exact] = pin.specifier
        assert exact.operator == "==" and wanted.specifier.contains(exact.version), wanted


def test_the_page_of_metrics_names_none_that_no_stage_logs():
    """tests/pipeline/test_metrics_page.py holds what is logged against the page."""
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    shared = "".join(path.read_text() for path in (ROOT / "lit_rlhf/stages").glob("*.py"))
    for name in re.findall(r"^\| `((?:val/)?\w+/\w+)` \|", page, re.MULTILINE):
        stage, metric = name.split("/")[-2:]
        code = (ROOT / f"lit_rlhf/stages/{stage}/module.py").read_text() + shared
        assert re.search(rf'["/]{metric}"', code), name
