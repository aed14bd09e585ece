"""The examples in the docstrings of public names run and print what they say."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path

import pytest

import layeredrl_torchrl

INDEX = Path(__file__).parents[1] / "docs" / "api" / "index.md"  # has the imports they assume
NAMES = {
    name: thing
    for name in layeredrl_torchrl.__all__
    if inspect.isclass(thing := getattr(layeredrl_torchrl, name)) or inspect.isfunction(thing)
}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.FAIL_FAST


def examples(thing, names):
    """Those of a function, or of a class and what is defined in it."""
    return [test for test in doctest.DocTestFinder().find(thing, globs=names) if test.examples]


@pytest.mark.parametrize("name", NAMES)
def test_examples(name, run_examples, tmp_path, monkeypatch):
    if name == "SuccessRate":  # in a point maze
        pytest.importorskip("gymnasium_robotics")
    monkeypatch.chdir(tmp_path)
    tests = examples(NAMES[name], run_examples(INDEX))
    said = []
    for test in tests:
        doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    assert not said, "".join(said)


@pytest.mark.parametrize("name", [name for name, thing in NAMES.items() if inspect.isclass(thing)])
def test_classes_have_examples(name):
    assert ">>> " in (NAMES[name].__doc__ or "")
