"""Report the progress of learning to a logger and in a progress bar."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torchrl.record.loggers import Logger
from tqdm import tqdm

__all__ = ["Renamed", "check_logger", "log_terms", "updates"]

# Seconds between two displays of the terms, since reading one waits for the GPU.
_EVERY = 1.0


def check_logger(logger: Logger | None) -> None:
    """Raise ``TypeError`` unless ``logger`` can log, or is ``None``.

    Loggers in another process share no base class with TorchRL's ``Logger``, so this checks the
    method instead of the class.
    """
    can_log = callable(getattr(logger, "log_metrics", None)) and not isinstance(logger, type)
    if logger is not None and not can_log:
        got = logger if isinstance(logger, type) else type(logger)
        raise TypeError(
            f"logger must be a torchrl.record.loggers.Logger or None, got {got.__name__}; "
            'for example CSVLogger("my_experiment")'
        )


def log_terms(logger: Logger | None, name: str, info: Mapping[str, float], step: int) -> None:
    """Log every term of ``info`` as the scalar ``"<name>/<term>"`` at ``step``."""
    if logger is not None:
        logger.log_metrics({f"{name}/{term}": value for term, value in info.items()}, step=step)


class Renamed:
    """A logger that renames the scalars of a part to the name of the whole.

    Args:
        logger: The logger that gets the scalars.
        part: The name under which the part logs.
        whole: The name to use instead.
    """

    def __init__(self, logger: Logger, part: str, whole: str) -> None:
        self.logger, self.part, self.whole = logger, part, whole

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log all ``metrics``, those of the part under the other name."""
        part = f"{self.part}/"
        renamed = {
            f"{self.whole}/{key.removeprefix(part)}" if key.startswith(part) else key: value
            for key, value in metrics.items()
        }
        self.logger.log_metrics(renamed, step=step)

    def __getattr__(self, name: str) -> Any:
        """Take everything else from the logger."""
        return getattr(self.logger, name)


def updates(
    n_updates: int, totals: Mapping[str, Tensor], counts: Mapping[str, int], *, bar: str | None
) -> Iterator[int]:
    """Count from 0 to ``n_updates - 1``, and show a progress bar on stderr if ``bar`` is given.

    Args:
        n_updates: Number of iterations of the caller's loop.
        totals: Scalar sums of the terms so far, filled by the caller's loop. About once a second
            the bar shows the mean of each term since the last display.
        counts: Number of updates in each sum, filled by the caller's loop.
        bar: Title of the bar.
    """
    if bar is None:
        yield from range(n_updates)
        return
    before: dict[str, tuple[float, int]] = {}
    looked = time.monotonic()
    with tqdm(total=n_updates, desc=bar, unit="update") as display:
        for i in range(n_updates):
            yield i
            if i + 1 == n_updates or time.monotonic() - looked > _EVERY:
                now = {name: (float(total), counts[name]) for name, total in totals.items()}
                means = {}
                for name, (total, n) in now.items():
                    total_before, n_before = before.get(name, (0.0, 0))
                    if n > n_before:
                        means[name] = f"{(total - total_before) / (n - n_before):.3g}"
                display.set_postfix(means, refresh=False)
                before, looked = now, time.monotonic()
            display.update()
