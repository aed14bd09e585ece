"""The manual: every Python block of its pages runs, and every public name is in the reference."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

import layeredrl_torchrl

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {page.relative_to(DOCS).as_posix(): page for page in sorted(DOCS.rglob("*.md"))}
WITH_CODE = [name for name, page in PAGES.items() if "```python" in page.read_text()]
REFERENCE = "\n".join(page.read_text() for name, page in PAGES.items() if name.startswith("api/"))
MODULES = re.findall(r"automodule:: (\S+)", REFERENCE)
PUBLIC = {name for module in MODULES for name in importlib.import_module(module).__all__}


@pytest.mark.parametrize("name", WITH_CODE)
def test_the_python_blocks_of_a_page_run(name, run_examples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for what an example writes
    assert run_examples(PAGES[name])


@pytest.mark.parametrize("name", PAGES)
def test_no_block_is_overlooked(name):
    """Fences that the test above does not run are of a kind that is not Python."""
    fences = re.findall(r"^ *(?:`{3,}|~{3,}|:{3,})(.*)$", PAGES[name].read_text(), re.MULTILINE)
    opened = set(fences) - {"", "python"}
    assert all(kind in ("bash", "diff", "text") or kind.startswith("{") for kind in opened), opened
    assert not any("python" in kind for kind in opened)


def test_reference_lists_every_public_name():
    assert len(set(MODULES)) == len(MODULES)
    assert not set(layeredrl_torchrl.__all__) - PUBLIC


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
    blocks = re.findall(r"```python\n(.*?)```", PAGES[name].read_text(), re.DOTALL)
    nodes = [node for block in blocks for node in ast.walk(ast.parse(block))]
    defined = {n.name for n in nodes if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    assert not defined & PUBLIC


def test_the_page_of_hooks_names_tests_that_exist():
    rows = re.findall(r"^\| .*\|$", (DOCS / "torchrl_hooks.md").read_text(), re.MULTILINE)
    tests = {row: re.findall(r"`(\S+\.py)`", row.split("|")[-2]) for row in rows}
    assert sum(map(len, tests.values())) > 40
    for row, paths in tests.items():
        assert all((DOCS.parent / "tests" / path).is_file() for path in paths), row
        assert paths or "| yes |" not in row, row


def test_the_architecture_names_classes_that_exist():
    text = (DOCS / "architecture.md").read_text()
    named = set(re.findall(r"\b[A-Z][a-zA-Z]*[a-z][A-Z][a-zA-Z]*\b", text))
    ours = [module for name, module in sys.modules.items() if name.startswith("layeredrl_torchrl")]
    known = {name for module in ours for name, x in vars(module).items() if isinstance(x, type)}
    assert named - {"AdamW", "MuJoCo", "TorchRL"} <= known
