"""Records: they agree with the settings and with the contract, and no other file lists stages."""

import ast
import re
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml

import lit_rlhf.stages
from lit_rlhf.errors import UserError
from lit_rlhf.stages import stage as records
from lit_rlhf.stages.contract import (
    EvaluatesPrompts,
    StageData,
    StageModule,
    TrainsOnPrompts,
    WritesSamples,
    check_contract,
)
from lit_rlhf.stages.stage import Stage, all_stages

PACKAGE = Path(lit_rlhf.stages.__file__).parents[1]
CONF = PACKAGE.parent / "conf"
STAGES = all_stages()


def located(path):
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def settings_of(name):
    return yaml.safe_load((CONF / name / "default.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", STAGES)
def test_a_record_names_what_its_settings_name(name):
    stage, settings = STAGES[name], settings_of(name)
    kind = located(stage.module)
    assert located(settings["module"]["_target_"]) is kind is getattr(lit_rlhf.stages, kind.__name__)
    options = [yaml.safe_load(file.read_text()) for file in (CONF / name / "data").glob("*.yaml")]
    options = [data.get("data", data) for data in options]
    assert {located(data["_target_"]) for data in options if "_target_" in data} == set(map(located, stage.data))
    assert issubclass(kind, lit_rlhf.stages.contract.StageModule)
    assert "samples_every" not in settings or issubclass(kind, WritesSamples)
    for data in map(located, stage.data):
        assert not stage.trains_on_prompts or issubclass(data, TrainsOnPrompts)
        assert "allow_trained" not in settings or issubclass(data, EvaluatesPrompts)


@pytest.mark.parametrize("name", STAGES)
def test_a_record_says_which_stage_each_model_comes_from(name):
    files = [
        CONF / name / "default.yaml",
        *(CONF / name).glob("init/*.yaml"),
        *(CONF / name).glob("reward_model/*.yaml"),
    ]
    text = "".join(line.partition(" #")[0] for file in files for line in file.read_text().splitlines(True))
    asked = set(re.findall(r"\$\{upstream:(\w+)", text))
    assert {stage for stage in STAGES[name].models.values() if stage is not None} == asked
    collected = any("upstream_data" in file.read_text() for file in (CONF / name / "data").glob("*.yaml"))
    assert (STAGES[name].data_from == "preference") == collected


def named(source):
    """Lines at which a stage is named by a text, where its record would say the name; values of settings apart."""
    tree = ast.parse(source)
    literals = [n for n in ast.walk(tree) if isinstance(n, ast.Subscript) and getattr(n.value, "id", "") == "Literal"]
    values = {id(inner) for literal in literals for inner in ast.walk(literal)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in STAGES and id(node) not in values:
            yield node.lineno


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_other_file_names_a_stage(file):
    if file.parent.parent.name == "stages":
        return
    assert not list(named(file.read_text(encoding="utf-8")))


IN_TEMPLATE = re.compile(rf"""\.(?:{"|".join(STAGES)})\b|['"](?:{"|".join(STAGES)})['"]""")


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.jinja")), ids=lambda file: file.name)
def test_no_template_asks_for_a_stage_by_its_name(file):
    asked = re.findall(r"{[{%].*?[}%]}", file.read_text(encoding="utf-8"), re.DOTALL)
    assert not [expression for expression in asked if IN_TEMPLATE.search(expression)]


def test_the_name_of_a_stage_is_found():
    assert IN_TEMPLATE.search("{% if curves.ppo %}") and IN_TEMPLATE.search("{{ 'sft' in begun }}")
    assert not IN_TEMPLATE.search("{% for dots in run.ppos %}")
    assert list(named('A = ("sft", "other")')) == [1] and list(named('if stage == "ppo": pass')) == [1]
    assert list(named('figures["ppo"]')) == [1] and not list(named('policy: Literal["last", "sft"]'))
    assert not list(named('A = ("others", "ppo/score")'))


@pytest.mark.parametrize("name", STAGES)
def test_no_export_has_the_name_of_a_file_beside_it(name):
    """Once that is imported, it would stand in the export's place."""
    package = import_module(f"lit_rlhf.stages.{name}")
    files = {file.stem for file in Path(package.__file__).parent.glob("*.py")}
    assert not files & set(package.__all__)
    assert all(hasattr(package, export) for export in package.__all__)


def test_the_package_exports_what_the_records_name():
    assert {"PPOModule", "PPODataModule", "WorldPPODataModule", "Stage"} <= set(dir(lit_rlhf.stages))
    assert lit_rlhf.stages.ppo.GAE.__module__ == "lit_rlhf.stages.ppo.advantage"
    for package in (lit_rlhf.stages, lit_rlhf.stages.ppo):
        with pytest.raises(AttributeError, match="has no attribute 'NoModule'"):
            _ = package.NoModule


@pytest.fixture
def points(monkeypatch):
    """(name, value) of entry points -> the stages that are found then."""

    def find(*named):
        found = [EntryPoint(name, value, records.GROUP) for name, value in named]
        monkeypatch.setattr(records, "entry_points", lambda group: found if group == records.GROUP else [])
        return all_stages.__wrapped__()

    return find


def test_stages_of_other_distributions_stand_in_their_place(points, monkeypatch):
    mine = Stage(name="mine", title="Mine", order=35, module="x.Mine", data=(), objective="val_loss")
    monkeypatch.setattr("lit_rlhf.errors.MINE", mine, raising=False)
    assert list(points(("mine", "lit_rlhf.errors:MINE")))[:4] == ["pretrain", "classify", "sft", "mine"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module:STAGE", r"stage mine \(no_such_module:STAGE\) cannot be imported: ModuleNotFoundError"),
        ("lit_rlhf.errors:say", "stage mine: lit_rlhf.errors:say is a function, no lit_rlhf Stage"),
        ("lit_rlhf.stages.sft:STAGE", "two stages are called 'sft'"),
    ],
)
def test_a_bad_entry_point_is_named(points, value, message):
    with pytest.raises(UserError, match=message):
        points(("mine", value))


def test_what_a_module_lacks_is_said():
    class Half:
        def figures(self): ...

    with pytest.raises(UserError, match=r"mine.module: a Half has no export; see lit_rlhf.stages.contract.StageModule"):
        check_contract(Half(), StageModule, "mine.module")
    with pytest.raises(UserError, match=r"has no for_module, how_long, long, moved, .*, tell, tokenizer; see"):
        check_contract(Half(), StageData, "mine.data")
