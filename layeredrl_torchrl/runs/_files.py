"""Files of a run: locks, atomic writes, and CSV files written row by row."""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

__all__ = ["Curve", "lock", "staged", "write_rows", "write_whole"]


class Curve:
    """Rows of numbers in a CSV file; if the run is killed, the rows written so far are complete.

    Loading its state from a checkpoint truncates the file to the rows of that time.

    >>> curve = Curve(Path("curve.csv"))
    >>> curve.add({"env_steps": 100.0, "return": 4.5})
    >>> Path("curve.csv").read_text().splitlines()
    ['env_steps,return', '100.0,4.5']

    Args:
        path: The file, created with the first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []

    def add(self, row: Mapping[str, float]) -> None:
        """Write one more row.

        Raises:
            TypeError: A value that is not a number. ValueError: Other columns than in the first
                row.
        """
        for name, value in row.items():
            if not isinstance(value, Real):
                raise TypeError(f"{self.path}: {name} is {value!r}, expected a number (.item())")
        numbers = {name: float(value) for name, value in row.items()}
        columns = list(numbers)
        if self.rows and columns != list(self.rows[0]):
            raise ValueError(f"{self.path} has columns {list(self.rows[0])}, got {columns}")
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if not self.rows:
                writer.writerow(columns)
            writer.writerow(numbers.values())
        self.rows.append(numbers)

    def rewrite(self) -> None:
        """Rewrite the file with the known rows."""
        write_rows(self.path, list(self.rows[0]) if self.rows else [], self._values())

    def _values(self) -> list[list[float]]:
        return [list(row.values()) for row in self.rows]

    def state_dict(self) -> dict[str, Any]:
        """Return the columns, and the values of each row."""
        return {"columns": list(self.rows[0]) if self.rows else [], "values": self._values()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replace the rows, also in the file, by the saved ones."""
        columns = state_dict["columns"]
        self.rows[:] = [dict(zip(columns, row, strict=True)) for row in state_dict["values"]]
        self.rewrite()


def write_rows(path: Path, columns: list[str], rows: Iterable[Iterable[float]]) -> None:
    """Write a CSV file atomically; without columns it is empty."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *rows] if columns else [])
    write_whole(path, text.getvalue())


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: at any moment there is either the old one or the new one."""
    with staged(path) as stage, stage.open("w", newline="", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a path to write to; what was written takes the place of ``path`` at the end."""
    stage = path.with_name(f".{path.stem}.stage{path.suffix}")
    try:
        yield stage
        os.replace(stage, path)
    finally:
        stage.unlink(missing_ok=True)


def lock(file: int) -> None:
    """Lock an open file until this process ends.

    Raises:
        BlockingIOError, PermissionError: Another process has the lock. OSError: The disk, of
            another machine for instance, knows no locks.
    """
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
