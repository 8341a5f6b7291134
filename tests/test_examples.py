"""The examples in the docstrings of vsod_ops run, and every public name has one."""

import doctest
import importlib
import inspect

import pytest

import vsod_ops


@pytest.mark.parametrize("name", [n for n in vsod_ops.__all__ if n != "__version__"])
def test_the_example_of_a_public_name_runs(name):
    public = getattr(vsod_ops, name)
    module = importlib.import_module(public.__module__)
    finder = doctest.DocTestFinder(recurse=inspect.isfunction(public))
    tests = [t for t in finder.find(public, name, globs=vars(module).copy()) if t.examples]
    assert tests, f"{name} has no example"
    for test in tests:
        assert doctest.DocTestRunner().run(test).failed == 0
