"""Would the tests notice? Changes one place of the package at random, and runs the tests for it.

    python benchmarks/mutations.py --n 150 --seed 0 --output output/mutations.jsonl

Each change is made in a copy of the working tree's tracked files: another operator, constant,
condition, or a statement left out. The tests of the changed file's folder run until one fails, then
those of all classes (``tests/test_conformance.py``, ``tests/test_bad_values.py``). What no test
notices is printed with its line, to be judged by hand: some changes change nothing that matters.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import hypothesis  # noqa: F401 - so that the tests' processes find it imported
import mujoco  # noqa: F401
import pytest
import torchrl.checkpoint
import torchrl.collectors
import torchrl.envs
import torchrl.modules
import torchrl.objectives
import torchrl.trainers  # noqa: F401

ROOT = Path(__file__).parents[1]
COMPARE = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
ARITHMETIC = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Pow: "*",
    ast.BitAnd: "|",
    ast.BitOr: "&",
    ast.MatMult: "*",
}
OTHERS = [
    "tests/test_conformance.py",
    "tests/test_bad_values.py",
    "tests/test_accelerator.py",
]
OF_ROOT = {
    "_graphs": ["tests/planners"],
    "_precision": ["tests/nets", "tests/models"],
    "_state": ["tests/predictors"],
}


def changes(source):
    """All ``(start, end, text)`` of the source that may be replaced, by byte offsets."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def at(node):
        begin = starts[node.lineno - 1] + node.col_offset
        return begin, starts[node.end_lineno - 1] + node.end_col_offset

    data, found = source.encode(), []

    def between(left, right, old_to_new, op):
        """Replace the operator between two operands."""
        start, end = at(left)[1], at(right)[0]
        text = data[start:end].decode()
        new = old_to_new.get(type(op))
        if new and "#" not in text:
            head, tail = text[: len(text) - len(text.lstrip(" )"))], text[len(text.rstrip(" (")) :]
            found.append((start, end, f"{head or ' '}{new}{tail or ' '}"))

    def visit(node):
        if isinstance(node, ast.JoinedStr | ast.Raise | ast.arg | ast.AnnAssign | ast.Import):
            return
        if isinstance(node, ast.Compare):
            for left, op, right in zip(
                [node.left, *node.comparators], node.ops, node.comparators, strict=False
            ):
                between(left, right, COMPARE, op)
        elif isinstance(node, ast.BinOp):
            between(node.left, node.right, ARITHMETIC, node.op)
        elif isinstance(node, ast.BoolOp):
            for left, right in zip(node.values, node.values[1:], strict=False):
                between(left, right, {ast.And: "or", ast.Or: "and"}, node.op)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
            found.append((at(node)[0], at(node.operand)[0], ""))
        elif isinstance(node, ast.If | ast.IfExp):
            start, end = at(node.test)
            found.append((start, end, f"not ({data[start:end].decode()})"))
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            value = node.value
            new = (
                not value if isinstance(value, bool) else value + (1 if value in (0, 1) else value)
            )
            found.append((*at(node), repr(new)))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            found.append((*at(node), "pass"))
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        visit(child)

    def is_code(change):
        start, end, text = change
        try:
            return ast.parse(data[:start] + text.encode() + data[end:])
        except SyntaxError:
            return None

    visit(ast.parse(source))
    return [change for change in found if is_code(change)]


def tests_of(path):
    """Folders and files of tests, the nearest first."""
    parts = path.with_suffix("").parts
    parts = parts[1:] if parts[0] == "layeredrl_torchrl" else parts
    own = Path("tests", *parts[:-1], f"test_{parts[-1].removeprefix('_')}.py")
    folders = [f"tests/{parts[0]}"] if len(parts) > 1 else OF_ROOT.get(parts[0], [])
    return [*([str(own)] if (ROOT / own).exists() else []), *folders, *OTHERS]


def noticed(folder, test):
    """Whether a test fails, in a process that has imported all but the package."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status) not in (0, pytest.ExitCode.NO_TESTS_COLLECTED)
    os.chdir(folder)
    sys.path[:] = [str(folder), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    sys.dont_write_bytecode = True
    signal.alarm(600)  # a change that makes a loop endless is noticed, too
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1), os.dup2(nothing, 2)
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", "--timeout", "120"]
    os._exit(pytest.main([*options, test]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=150, help="number of changes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files whose path contains this")
    parser.add_argument("--output", type=Path, default=Path("mutations.jsonl"))
    args = parser.parse_args()
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    places = []
    for name in tracked:
        path = Path(name)
        ours = path.parts[0] in ("layeredrl_torchrl", "envs") and path.suffix == ".py"
        if ours and args.only in name and path.name not in ("__init__.py", "__main__.py"):
            places += [(path, *change) for change in changes((ROOT / path).read_text())]
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in tracked:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
        for i, (path, start, end, text) in enumerate(random.sample(places, args.n)):
            before = (folder / path).read_bytes()
            (folder / path).write_bytes(before[:start] + text.encode() + before[end:])
            by = next((test for test in tests_of(path) if noticed(folder, test)), None)
            (folder / path).write_bytes(before)
            line = before.count(b"\n", 0, start) + 1
            was = before[start:end].decode()
            row = {"file": str(path), "line": line, "was": was, "is": text, "noticed": by}
            with args.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                i + 1, path, line, repr(was), "->", repr(text), by or "NOBODY NOTICED", flush=True
            )


if __name__ == "__main__":
    main()
