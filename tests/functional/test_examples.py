"""Every function shows by an example what it gives, and the examples are right."""

import doctest
import inspect
import pkgutil
from importlib import import_module

import pytest

from lit_rlhf import functional

MODULES = [import_module(module.name) for module in pkgutil.iter_modules(functional.__path__, "lit_rlhf.functional.")]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_function_has_an_example_that_holds(module):
    functions = [f for _, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == module.__name__]
    missing = [f.__name__ for f in functions if not f.__name__.startswith("_") and ">>>" not in f.__doc__]
    assert functions and not missing
    assert doctest.testmod(module).failed == 0
