"""Imports point down, never up, never from stage to stage, and never in a circle."""

import ast
import sys
from pathlib import Path

import pytest

import lit_rlhf

PACKAGE = Path(lit_rlhf.__file__).parent
LAYERS = (
    "pipeline",
    "apps",
    "stages",
    "rollouts",
    "training",
    "models",
    "text",
    "functional",
    "finished",
    "files",
    "arguments",
    "errors",
    "processes",
)  # top to bottom
FILES = sorted(PACKAGE.rglob("*.py"))
STAGES = {folder.parent.name for folder in PACKAGE.glob("stages/*/__init__.py")}


def module_name(file):
    """lit_rlhf/text/world/facts.py -> ("lit_rlhf", "text", "world", "facts"); a package by its folder."""
    parts = ("lit_rlhf", *file.relative_to(PACKAGE).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(source, package):
    """Every module that ``source`` imports, wherever in the file, as (dotted name, line)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            if base == ["lit_rlhf"]:  # from lit_rlhf import stages
                yield from ((f"lit_rlhf.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield ".".join(base), node.lineno


def faults(source, module, is_package=False):
    """What is wrong with the imports of a module, one line each."""
    layer = module[1] if len(module) > 1 else None
    for name, line in imports(source, module if is_package else module[:-1]):
        top, *rest = name.split(".")
        if top in ("hydra", "omegaconf") and layer != "pipeline":
            yield f"{'.'.join(module)}:{line} imports {top}, which only the pipeline may"
        if layer == "functional" and top not in ("torch", "lit_rlhf") and top not in sys.stdlib_module_names:
            yield f"{'.'.join(module)}:{line} imports {top}; functional/ takes torch only"
        if top != "lit_rlhf" or not rest or rest[0] not in LAYERS or layer == "__main__":
            continue
        if layer is None:  # lit_rlhf/__init__.py: whoever imports a layer would import this one too
            if name != "lit_rlhf.apps.loaded_run":  # but for what `lit_rlhf.load` imports when it is called
                yield f"{'.'.join(module)}:{line} imports {name}; the package itself imports no layer"
        elif LAYERS.index(rest[0]) < LAYERS.index(layer):
            yield f"{'.'.join(module)}:{line} imports {name}, which is above it"
        elif layer == "stages" and len(module) > 2 and rest[0] == "stages" and {*rest[1:2]} & STAGES - {module[2]}:
            yield f"{'.'.join(module)}:{line} imports {name}, another stage; what several use belongs to a layer below"
        elif layer == "stages" and len(module) > 2 and rest == ["stages"]:
            yield f"{'.'.join(module)}:{line} imports {name}, which hands out every stage; import from where it stands"
        elif layer == "functional" and rest[0] != "functional":
            yield f"{'.'.join(module)}:{line} imports {name}; functional/ imports nothing else of the package"


def circle(graph):
    """Modules that import each other in turn, the first one again at the end; [] where there are none."""
    done, path = set(), []

    def walk(node):
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        path.append(node)
        found = next((c for child in sorted(graph.get(node, ())) if (c := walk(child))), [])
        path.pop()
        done.add(node)
        return found

    return next((c for node in sorted(graph) if (c := walk(node))), [])


def imported_modules(source, package, known):
    """Which of the ``known`` modules ``source`` imports, wherever in the file: ``from a import b`` is a.b where that is
    a module, and else a."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base = ".".join(base + (node.module.split(".") if node.module else []))
            names = {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
            yield from names & known


def test_no_imports_in_a_circle():
    known = {".".join(module_name(file)): file for file in FILES}
    graph = {}
    for name, file in known.items():
        package = module_name(file) if file.name == "__init__.py" else module_name(file)[:-1]
        graph[name] = set(imported_modules(file.read_text(encoding="utf-8"), package, known.keys()))
    assert not circle(graph)


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})
    hidden = "if TYPE_CHECKING:\n    from lit_rlhf.stages.ppo.module import PPOModule\ndef f():\n    from . import b, C"
    known = {"lit_rlhf.stages.ppo.module", "lit_rlhf.stages.ppo.b", "lit_rlhf.stages.ppo"}
    assert set(imported_modules(hidden, ("lit_rlhf", "stages", "ppo"), known)) == known


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_down(file):
    assert not list(faults(file.read_text(encoding="utf-8"), module_name(file), file.name == "__init__.py"))


def test_every_file_belongs_to_a_layer():
    folders = {module_name(file)[1] for file in FILES if len(module_name(file)) > 1}
    assert folders <= {*LAYERS, "__main__"}
    assert set(LAYERS) <= folders


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("text.chat", "from lit_rlhf.models import answer"),
        ("text.chat", "import lit_rlhf.models.policy as policy"),
        ("text.chat", "from lit_rlhf import stages"),
        ("text.chat", "from ..training import adamw"),
        ("text.chat", "def f():\n    from lit_rlhf.apps.report import report"),
        ("text.chat", "if TYPE_CHECKING:\n    from lit_rlhf.models import answer"),
        ("stages.sft.module", "import hydra"),
        ("stages.sft.module", "from omegaconf import DictConfig"),
        ("functional.kl", "import numpy as np"),
        ("functional.kl", "from lit_rlhf.errors import UserError"),
        ("errors", "from lit_rlhf.functional import kl"),
        ("rollouts.fast", "from lit_rlhf.stages.ppo import Scoring"),
        ("stages.dpo.module", "from lit_rlhf.stages.ppo.rollout import Rollout"),
        ("stages.dpo.module", "if TYPE_CHECKING:\n    from lit_rlhf.stages.ppo.module import PPOModule"),
        ("stages.rankings", "from lit_rlhf.stages.pretrain.data import TextRows"),
        ("stages.sft.module", "from lit_rlhf.stages import DPOModule"),
        ("stages.sft.module", "from lit_rlhf.stages import dpo"),
        ("stages.sft.module", "from lit_rlhf import stages"),
        ("stages.sft.module", "from .. import dpo"),
    ],
)
def test_an_import_that_points_up_is_found(module, source):
    assert len(list(faults(source, ("lit_rlhf", *module.split("."))))) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("models.policy", "from lit_rlhf.text.chat import BASE_TEMPLATE"),
        ("models.policy", "from . import heads"),
        ("pipeline.run", "import hydra\nfrom omegaconf import DictConfig\nfrom lit_rlhf import stages"),
        ("functional.kl", "import math\nimport torch.nn.functional as F\nfrom lit_rlhf.functional.lm import lm_loss"),
        ("functional.kl", "from .lm import lm_loss"),
        ("text.chat", "from lit_rlhf.errors import UserError"),
        ("stages.dpo.module", "from lit_rlhf.stages.rankings import ranked\nfrom lit_rlhf.stages.dpo.data import D"),
        ("stages", "from lit_rlhf.stages.dpo import DPOModule"),
    ],
)
def test_an_import_that_points_down_is_not(module, source):
    assert not list(faults(source, ("lit_rlhf", *module.split("."))))


def test_nothing_is_too_long_to_be_read():
    """Files of at most 450 lines, classes of 300, functions of 60."""
    most = {ast.ClassDef: 300, ast.FunctionDef: 60, ast.AsyncFunctionDef: 60}
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        assert text.count("\n") <= 450, file
        for node in ast.walk(ast.parse(text)):
            if type(node) in most:
                assert node.end_lineno - node.lineno < most[type(node)], (file, node.name)
