"""Undo learning after an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from layeredrl_torchrl._state import undone_on_error
from layeredrl_torchrl.levels._storing import Overwritten
from layeredrl_torchrl.levels.level import Level

__all__ = ["all_or_nothing"]


@contextmanager
def all_or_nothing(level: Level, n_rows: int) -> Iterator[None]:
    """Restore ``level`` if the block raises anything, including ``KeyboardInterrupt``.

    Parameters, counters, statistics, the state of the optimizer and the buffer's rows are
    restored; random number generators are not.

    Args:
        level: The level that learns.
        n_rows: Upper bound of the number of rows that it stores.
    """
    rows = None if level.buffer is None else Overwritten(level.buffer, n_rows)
    with undone_on_error(*(one for one in (level, level.optim) if one is not None)):
        try:
            yield
        except BaseException:
            if rows is not None:
                rows.put_back()
            raise
