"""The last few checkpoints of a run."""

from __future__ import annotations

import glob
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
    """TorchRL's ``CheckpointRotation``, which here skips damaged checkpoints with a warning.

    If saving is killed, the next :meth:`save` removes the unfinished files.

    >>> rotation = SafeRotation("checkpoints", keep_last=2)
    >>> path = rotation.save(SafeCheckpoint(value={"loss": 0.5}), step=100)
    >>> rotation.latest().name
    'checkpoint-000000000100'

    Args:
        directory: Folder of the checkpoints.
        keep_last: Number of newest checkpoints to keep.
        keep_best: See ``CheckpointRotation``.
        prefix: Prefix of their names.
    """

    def save(self, checkpoint: Checkpoint, *, step: int, **options: Any) -> Path:
        """Save at ``step`` and remove old checkpoints.

        Args:
            checkpoint: A :class:`SafeCheckpoint`.
            step: Step, which is part of the name.
            **options: Options of ``CheckpointRotation.save``.

        Raises:
            TypeError: Not a :class:`SafeCheckpoint`. CheckpointError: As ``SafeCheckpoint.save``.
        """
        if not isinstance(checkpoint, SafeCheckpoint):
            raise TypeError(f"expected a SafeCheckpoint, got {type(checkpoint).__name__}")
        self.clear()
        path: Path = super().save(checkpoint, step=step, **options)
        return path

    def clear(self) -> None:
        """Remove checkpoints that were only partly written, or partly removed."""
        for path in self.directory.glob(f".*{glob.escape(self.prefix)}-*"):
            shutil.rmtree(path, ignore_errors=True)

    def latest(self) -> Path | None:
        """Return the newest sound checkpoint; ``None`` if there are no checkpoints.

        A warning names each newer, damaged one.

        Raises:
            CheckpointError: There are checkpoints, and all are damaged.
        """
        first: CheckpointError | None = None
        found = self.directory.glob(f"{glob.escape(self.prefix)}-[0-9]*")
        for path in sorted(found, reverse=True):
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
        """Load the newest sound checkpoint; ``options`` are those of ``Checkpoint.load``.

        Returns:
            The result of loading; ``None`` if there is no checkpoint.
        """
        path = self.latest()
        return None if path is None else checkpoint.load(path, **options)
