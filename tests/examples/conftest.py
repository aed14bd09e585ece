"""Running an example as a user does, and reading what it leaves."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def run_script():
    """``run_script(name, *options)``: the example in a process of its own, one thread."""

    def run(name: str, *options: str) -> subprocess.CompletedProcess[str]:
        environment = {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, str(EXAMPLES / name), *options],
            capture_output=True,
            text=True,
            env=os.environ | environment,
            timeout=280,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def curve():
    """``curve(folder)``: the rows of the learning curve."""

    def read(folder: Path) -> list[dict[str, str]]:
        with (folder / "curve.csv").open() as file:
            return list(csv.DictReader(file))

    return read
