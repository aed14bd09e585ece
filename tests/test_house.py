"""The structure of the package: floors that import only from below, no circles, few flat names.

Read from the source, so an import under ``TYPE_CHECKING`` or inside a function counts too. What is
imported from a package counts as an import of the file that defines it.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import layeredrl_torchrl

NAME = "layeredrl_torchrl"
# Where they are imported from; on disk envs may lie beside the package.
ROOTS = {
    (): Path(layeredrl_torchrl.__file__).parent,
    ("envs",): Path(layeredrl_torchrl.envs.__file__).parent,
}
FLOORS = [
    "specs",
    "nets",
    "models",
    "objectives",
    "predictors",
    "imagination",
    "planners",
    "levels",
    "hierarchies",
    "runs",
    "plots",
]
ASIDE = {"checkpoints", "optimizers", "transforms", "envs"}  # of the package, they know only specs
# Of the floors; any floor may use specs.
USED_BY = {"optimizers": {"planners"}, "checkpoints": {"hierarchies", "runs"}, "envs": {"runs"}}

MAX_FLAT_NAMES = 75


@cache
def files():
    """``{"models.ensemble": tree, ...}`` of the package; a package's own file is ``"models"``."""
    found = {}
    for prefix, root in ROOTS.items():
        for path in root.rglob("*.py"):
            parts = (*prefix, *path.relative_to(root).with_suffix("").parts)
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join(parts)] = ast.parse(path.read_text())
    return found


def imports(tree):
    """``(module, name or None)`` for everything a file imports from this package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide what is imported"
            module, names = node.module, [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((a.name.partition(".")[2], None) for a in node.names if at_home(a.name))
            continue
        else:
            continue
        if at_home(module):
            yield from ((module.partition(".")[2], name) for name in names)


def at_home(module):
    return module.partition(".")[0] == NAME


def defining_file(module, name):
    """The file that a name comes from, past the lists of names in ``__init__`` files."""
    inner = f"{module}.{name}".lstrip(".")
    if name is None or inner in files():
        return module if name is None else inner
    for origin, exported in imports(files()[module]):
        if exported == name and origin != module:
            return defining_file(origin, name)
    return module


@cache
def graph():
    """Which files each file imports; ``__init__`` files, which only hand on, have no part in it."""
    packages = {name.rpartition(".")[0] for name in files()} | {""}
    return {
        name: {defining_file(*found) for found in imports(tree)} - packages
        for name, tree in files().items()
        if name not in packages
    }


def reachable(start):
    found, todo = set(), [start]
    while todo:
        new = graph()[todo.pop()] - found
        found |= new
        todo += new
    return found


def floor(name):
    return name.partition(".")[0]


def allowed(here):
    """The packages and modules that one of them may import."""
    if here.startswith("_") or here in ASIDE:
        return {here, "specs"}
    below = set(FLOORS[: FLOORS.index(here) + 1])
    return below | {name for name, users in USED_BY.items() if here in users}


def test_what_to_install_is_quoted_as_every_shell_takes_it():
    """Windows' own takes double quotes only."""
    texts = [path.read_text("utf-8") for root in ROOTS.values() for path in root.rglob("*.py")]
    assert any('".[' in text for text in texts)
    assert not any("'.[" in text for text in texts)


def test_no_file_is_in_a_circle():
    circles = {name for name in graph() if name in reachable(name)}
    assert not circles


@pytest.mark.parametrize("name", sorted(graph()))
def test_files_import_only_from_the_floors_below(name):
    used = {floor(other) for other in graph()[name]}
    above = {other for other in used - allowed(floor(name)) if not other.startswith("_")}
    assert not above, f"{name} imports from {sorted(above)}"


def test_the_flat_list_is_short_and_names_what_the_packages_hand_on():
    flat = layeredrl_torchrl.__all__
    assert len(flat) == len(set(flat)) <= MAX_FLAT_NAMES
    handed_on = {name for _, name in imports(files()[""])}
    assert handed_on == set(flat)
