"""Learning as a whole, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from layeredrl_torchrl._state import undone_on_error
from layeredrl_torchrl.levels._storing import Overwritten
from layeredrl_torchrl.levels.level import Level

__all__ = ["all_or_nothing"]


@contextmanager
def all_or_nothing(level: Level, n_rows: int) -> Iterator[None]:
    """Put ``level`` back to what it was if anything is raised, ``KeyboardInterrupt`` included.

    Parameters, counters, statistics, the state of the optimizer and the buffer's rows are put
    back; random number generators go on.

    Args:
        level: A level that may learn.
        n_rows: Rows that it may store, at most.
    """
    rows = None if level.buffer is None else Overwritten(level.buffer, n_rows)
    with undone_on_error(*(one for one in (level, level.optim) if one is not None)):
        try:
            yield
        except BaseException:
            if rows is not None:
                rows.put_back()
            raise
