"""The examples in the docstrings of public names run and print what they say.

Public is what the flat list or a package's own list names.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import layeredrl_torchrl

PACKAGES = [
    importlib.import_module(f"layeredrl_torchrl.{found.name}")
    for found in pkgutil.iter_modules(layeredrl_torchrl.__path__)
    if found.ispkg
]
INDEX = Path(__file__).parents[1] / "docs" / "api" / "index.md"  # has the imports they assume
NAMES = {
    name: (package, thing)
    for package in PACKAGES
    for name in package.__all__
    if inspect.isclass(thing := getattr(package, name)) or inspect.isfunction(thing)
}
FLAT_CLASSES = [
    name
    for name in sorted(NAMES.keys() & set(layeredrl_torchrl.__all__))
    if inspect.isclass(NAMES[name][1])
]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.FAIL_FAST


def examples(thing, names):
    """Those of a function, or of a class and what is defined in it."""
    return [test for test in doctest.DocTestFinder().find(thing, globs=names) if test.examples]


WITH_EXAMPLES = [name for name, (_, thing) in NAMES.items() if examples(thing, {})]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_print_what_they_say(name, run_examples, tmp_path, monkeypatch):
    if name == "SuccessRate":  # in a point maze
        pytest.importorskip("gymnasium_robotics")
    monkeypatch.chdir(tmp_path)
    package, thing = NAMES[name]
    said = []
    for test in examples(thing, run_examples(INDEX) | vars(package)):
        doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    assert not said, "".join(said)


@pytest.mark.parametrize("name", FLAT_CLASSES)
def test_classes_of_the_flat_list_have_examples(name):
    assert ">>> " in (NAMES[name][1].__doc__ or "")
