"""What the examples keep of a run: curves as CSV files, and checkpoints to go on from."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchrl.checkpoint import Checkpoint, CheckpointRotation


def write_csv(path: Path, rows: list[dict[str, float]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path, until: float = float("inf")) -> list[dict[str, float]]:
    """The rows of a curve up to `until` steps."""
    with path.open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    return [row for row in rows if row["env_steps"] <= until]


def rotation_of(folder: Path) -> CheckpointRotation:
    """Where the last two checkpoints of a run are kept."""
    return CheckpointRotation(folder / "checkpoints", keep_last=2)


def load_latest(
    folder: Path, checkpoint: Checkpoint, now: Mapping[str, Any], shape: Sequence[str]
) -> dict[str, Any]:
    """Load the last checkpoint of a run that was made with the same settings.

    Args:
        folder: The run's folder.
        checkpoint: What is loaded into.
        now: The settings now, as they are in a checkpoint's metadata.
        shape: Names of the settings that a checkpoint has to share.

    Returns:
        The checkpoint's metadata.
    """
    rotation = rotation_of(folder)
    latest = rotation.latest()
    if latest is None:
        raise SystemExit(f"--resume: {folder} has no checkpoint; leave it out")
    saved: dict[str, Any] = Checkpoint.manifest(latest)["metadata"]
    other = {name: saved.get(name) for name in shape if saved.get(name) != now[name]}
    if other:
        raise SystemExit(f"--resume: {folder} was made with {other}; use the same")
    rotation.load_latest(checkpoint)
    return saved
