"""The last few checkpoints of a run."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

from torchrl.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointLoadResult,
    CheckpointRotation,
)

from layeredrl_torchrl.checkpoints.safe import SafeCheckpoint

__all__ = ["SafeRotation"]


class SafeRotation(CheckpointRotation):
    """TorchRL's ``CheckpointRotation`` that passes over damaged checkpoints, and says so.

    What saving left behind when it was killed is cleared by the next :meth:`save`.

    >>> rotation = SafeRotation("checkpoints", keep_last=2)
    >>> path = rotation.save(SafeCheckpoint(value={"loss": 0.5}), step=100)
    >>> rotation.latest().name
    'checkpoint-000000000100'

    Args:
        directory: Folder of the checkpoints.
        keep_last: How many of the newest are kept.
        keep_best: As ``CheckpointRotation``.
        prefix: How their names begin.
    """

    def save(self, checkpoint: Checkpoint, *, step: int, **options: Any) -> Path:
        """Save at ``step`` and remove old checkpoints; ``options`` as ``CheckpointRotation.save``.

        Raises:
            TypeError: Not a :class:`SafeCheckpoint`. CheckpointError: As ``SafeCheckpoint.save``.
        """
        if not isinstance(checkpoint, SafeCheckpoint):
            raise TypeError(f"expected a SafeCheckpoint, got {type(checkpoint).__name__}")
        self.clear()
        path: Path = super().save(checkpoint, step=step, **options)
        return path

    def clear(self) -> None:
        """Remove the halves of checkpoints that were being written, or removed, at a kill."""
        for path in self.directory.glob(f".*{self.prefix}-*"):
            shutil.rmtree(path, ignore_errors=True)

    def latest(self) -> Path | None:
        """The newest checkpoint that is sound; ``None`` if there are none at all.

        Each damaged one that is newer is named in a warning.

        Raises:
            CheckpointError: There are checkpoints, and all are damaged.
        """
        first: CheckpointError | None = None
        for path in sorted(self.directory.glob(f"{self.prefix}-[0-9]*"), reverse=True):
            try:
                SafeCheckpoint.verify(path)
            except CheckpointError as error:
                warnings.warn(f"{error}; trying the one before", stacklevel=2)
                first = first or error
                continue
            return path
        if first is not None:
            raise CheckpointError(f"no checkpoint in {self.directory} is sound: {first}")
        return None

    def load_latest(self, checkpoint: Checkpoint, **options: Any) -> CheckpointLoadResult | None:
        """Load the newest sound checkpoint; ``options`` as ``Checkpoint.load``.

        Returns:
            What was loaded; ``None`` if there is no checkpoint.
        """
        path = self.latest()
        return None if path is None else checkpoint.load(path, **options)
