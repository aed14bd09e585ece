"""The checkpoints of a run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrl.checkpoint import Checkpoint, CheckpointError
from tqdm import tqdm

from layeredrl_torchrl.checkpoints import SafeCheckpoint, SafeRotation
from layeredrl_torchrl.runs.options import RunError

__all__ = ["RunCheckpoints"]


class RunCheckpoints:
    """Saves the parts of a run, and loads them when the run is resumed.

    Args:
        directory: Folder of the checkpoints.
        **parts: Parts of every checkpoint.

    Attributes:
        resumed: The checkpoint from which the run is resumed; ``None`` if it starts from scratch.
        saved_at: Step of the last checkpoint.
    """

    def __init__(self, directory: Path, **parts: Any) -> None:
        self.checkpoint = SafeCheckpoint(**parts)
        self.rotation = SafeRotation(directory, keep_last=2)
        self.resumed: Path | None = None
        self.saved_at = 0

    @property
    def any_saved(self) -> bool:
        """Whether the folder holds a checkpoint, sound or not."""
        directory = self.rotation.directory
        return directory.is_dir() and any(directory.glob("[!.]*"))

    def find(self) -> None:
        """Set :attr:`resumed` to the newest sound checkpoint, and name the damaged ones.

        Raises:
            RunError: All are damaged.
        """
        with warnings.catch_warnings(record=True) as damaged:
            warnings.simplefilter("always")
            try:
                self.resumed = self.rotation.latest()
            except CheckpointError as error:
                raise RunError(str(error)) from None
        for warning in damaged:
            tqdm.write(str(warning.message))

    def keep(self, name: str, part: Any) -> None:
        """Add a part; if the run is resumed, load it."""
        self.checkpoint.register(name, part)
        if self.resumed is not None:
            self.load(name)

    def load(self, *names: str) -> None:
        """Load parts from :attr:`resumed`.

        Raises:
            RunError: The checkpoint has no such part, or it does not fit.
        """
        try:
            # find() has verified it. Parts copy loaded tensors to their own device.
            Checkpoint.load(self.checkpoint, self.resumed, components=names, map_location="cpu")
        except CheckpointError as error:
            raise RunError(f"--resume: {error}") from error

    def save(self, step: int, metadata: Mapping[str, Any]) -> None:
        """Save a checkpoint."""
        self.rotation.save(self.checkpoint, step=step, metadata=metadata)
        self.saved_at = step
