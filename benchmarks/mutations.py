"""Would the tests notice? Makes random changes to the package, one at a time, and runs its tests.

    pip install pytest-cov
    python benchmarks/mutations.py --n 150 --seed 0 --output output/mutations.jsonl

Each change is made in a copy of the working tree's tracked files: another operator, constant or
condition, or a statement removed. First all tests except the slow ones run once, to find out which
lines each of them runs (``--tests`` keeps this for other seeds of the same commit). Then the tests
that run the changed line and the file's own tests run until one fails: first the file's own, then
the fastest, up to a minute in total; then all tests of the file's folder. Changes that no test
notices are printed with their line, to be judged manually: some changes have no effect that
matters.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import coverage
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
SECONDS = 60.0  # of tests for one change, by their times in the first run


def changes(source):
    """Return all possible changes of the source as ``(start, end, text)``, in byte offsets."""
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


class Durations:
    """A pytest plugin that records how long each test takes, and which tests fail."""

    def __init__(self):
        self.seconds = {}
        self.failed = []

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed.append(report.nodeid)


def run_tests(folder, options, plugins=()):
    """Run pytest on the copy, in a process that has imported everything but the package."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)
    os.chdir(folder)
    sys.path[:] = [str(folder), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    os.environ["PYTHONPATH"] = str(folder)  # for the processes that tests start
    sys.dont_write_bytecode = True
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1), os.dup2(nothing, 2)
    fixed = ["-q", "-p", "no:cacheprovider", "-m", "not slow"]
    code = pytest.main([*fixed, *options], plugins=list(plugins))
    for plugin in plugins:
        (folder / "durations.json").write_text(json.dumps(vars(plugin)))
    os._exit(code)


def observe(folder, kept):
    """Run all tests; store which lines each of them runs, and how long it takes."""
    options = ["--cov=layeredrl_torchrl", "--cov=envs", "--cov-context=test", "--cov-report="]
    code = run_tests(folder, options, [Durations()])
    observed = json.loads((folder / "durations.json").read_text())
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        sys.exit(f"the tests do not run here: pytest ended with {code!r}")
    failed = set(observed["failed"])
    if failed:
        print(f"left out, for they fail without any change: {sorted(failed)}", flush=True)
    data = coverage.CoverageData(folder / ".coverage")
    data.read()
    lines = {}
    for name in data.measured_files():
        by_line = data.contexts_by_lineno(name)
        lines[str(Path(name).resolve().relative_to(folder.resolve()))] = {
            line: sorted({context.partition("|")[0] for context in contexts if context} - failed)
            for line, contexts in by_line.items()
        }
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"lines": lines, "seconds": observed["seconds"]}))


def tests_of(path, first, last, kept):
    """Return the tests that run one of the lines, as many as fit in the time.

    For coverage, a line that runs when the package is imported belongs to no test.
    """
    by_line, seconds = kept["lines"].get(str(path), {}), kept["seconds"]
    found = {test for line in range(first, last + 1) for test in by_line.get(str(line), ())}
    at_import = any(by_line.get(str(line)) == [] for line in range(first, last + 1))
    if not found and at_import:
        found = {test for tests in by_line.values() for test in tests}
    own = path.stem.removeprefix("_")

    def order(test):
        place = Path(test.partition("::")[0])
        whole = place.parent.name == "tests"  # tests of all classes
        near = place.stem != f"test_{own}", not whole and path.parts[-2] not in place.parts
        return (*near, seconds.get(test, 0.0), test)

    # Code that runs during test collection belongs to no test either: run the file's own tests.
    found |= {test for test in seconds if order(test)[:2] == (False, False)}
    chosen, total = [], 0.0
    for test in sorted(found, key=order):
        total += seconds.get(test, 0.0)
        if chosen and total > SECONDS:
            break
        chosen.append(test)
    return chosen


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=150, help="number of changes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files whose path contains this")
    parser.add_argument(
        "--tests", type=Path, default=Path("output/mutations_tests.json"), help="which runs what"
    )
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
        if not args.tests.exists():
            observe(folder, args.tests)
        kept = json.loads(args.tests.read_text())
        for i, (path, start, end, text) in enumerate(random.sample(places, args.n)):
            before = (folder / path).read_bytes()
            line = before.count(b"\n", 0, start) + 1
            tests = tests_of(path, line, line + before.count(b"\n", start, end), kept)
            (folder / path).write_bytes(before[:start] + text.encode() + before[end:])
            # The timeout notices changes that make a loop endless.
            options = ["-x", "--timeout", "120", "--timeout-method", "signal"]
            asked = [tests] if tests else []
            if (folder / "tests" / path.parts[-2]).exists():
                # Code in a process that a test has started belongs to no test: run the folder's
                # tests.
                asked.append([f"tests/{path.parts[-2]}"])
            passes = (run_tests(folder, [*options, *some]) == pytest.ExitCode.OK for some in asked)
            by = not all(passes)
            (folder / path).write_bytes(before)
            was = before[start:end].decode()
            row = {"file": str(path), "line": line, "was": was, "is": text}
            row |= {"tests": len(tests), "noticed": by}
            with args.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                i + 1,
                path,
                line,
                repr(was),
                "->",
                repr(text),
                "noticed" if by else f"NOBODY NOTICED of {len(tests)} tests",
                flush=True,
            )


if __name__ == "__main__":
    main()
