"""Ctrl-C that waits for the end of a batch."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

from tqdm import tqdm

__all__ = ["Interrupts"]


class Interrupts:
    """Notes the first Ctrl-C in the block, so that the current batch can be completed and saved.

    The second one interrupts at once, as usual. In other threads, and if another handler of Ctrl-C
    is installed, nothing changes.

    Attributes:
        noted: Whether Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        self.noted = False
        self._listens = False

    def __enter__(self) -> Self:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self._listens = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let Ctrl-C interrupt at once again."""
        if self._listens:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._listens = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tqdm.write("Interrupted: this batch is completed and saved first. Ctrl-C again stops now.")
