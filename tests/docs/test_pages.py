"""The manual: every Python block of its pages runs, and every public name is in the reference."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import layeredrl_torchrl

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {page.relative_to(DOCS).as_posix(): page for page in sorted(DOCS.rglob("*.md"))}
WITH_CODE = [name for name, page in PAGES.items() if "```python" in page.read_text()]
MODULES = list(pkgutil.walk_packages(layeredrl_torchrl.__path__, "layeredrl_torchrl."))


@pytest.mark.parametrize("name", WITH_CODE)
def test_examples_run(name, run_examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for what an example writes
    assert run_examples(PAGES[name])


@pytest.mark.parametrize("name", PAGES)
def test_no_block_is_overlooked(name):
    """Fences that the test above does not run are of a kind that is not Python."""
    fences = re.findall(r"^ *(?:`{3,}|~{3,}|:{3,})(.*)$", PAGES[name].read_text(), re.MULTILINE)
    opened = set(fences) - {"", "python"}
    assert all(kind in ("bash", "text") or kind.startswith("{") for kind in opened), opened
    assert not any("python" in kind for kind in opened)


def test_reference_lists_every_public_name():
    pages = [page.read_text() for name, page in PAGES.items() if name.startswith("api/")]
    modules = re.findall(r"automodule:: (\S+)", "\n".join(pages))
    assert len(set(modules)) == len(modules)
    listed = {name for module in modules for name in importlib.import_module(module).__all__}
    assert not set(layeredrl_torchrl.__all__) - listed


def test_pages_can_be_reached():
    """Each page is in a table of contents, which is what a reader goes by."""
    entries = set()
    for name, page in PAGES.items():
        folder = Path(name).parent
        for block in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(), re.DOTALL):
            lines = [line for line in block.splitlines() if line and not line.startswith(":")]
            entries |= {(folder / f"{line}.md").as_posix() for line in lines}
    assert entries == set(PAGES) - {"index.md"}


@pytest.mark.parametrize("name", WITH_CODE)
def test_no_definition_shadows_a_public_name(name):
    packages = [importlib.import_module(found.name) for found in MODULES if found.ispkg]
    public = {one for package in packages for one in package.__all__}
    blocks = re.findall(r"```python\n(.*?)```", PAGES[name].read_text(), re.DOTALL)
    nodes = [node for block in blocks for node in ast.walk(ast.parse(block))]
    defined = {n.name for n in nodes if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    assert not defined & public


def test_the_architecture_names_classes_that_exist():
    text = (DOCS / "architecture.md").read_text()
    named = set(re.findall(r"\b[A-Z][a-zA-Z]*[a-z][A-Z][a-zA-Z]*\b", text))
    known = {
        name
        for found in MODULES
        if not found.name.endswith("__main__")
        for name, value in vars(importlib.import_module(found.name)).items()
        if isinstance(value, type)
    }
    assert named - {"AdamW", "MuJoCo", "TorchRL"} <= known
