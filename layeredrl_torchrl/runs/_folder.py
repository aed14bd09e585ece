"""The folder of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layeredrl_torchrl.runs._files import lock, write_whole
from layeredrl_torchrl.runs.options import RunError, RunOptions

__all__ = ["RunFolder", "read_settings"]


class RunFolder:
    """The folder of one run; one process at a time writes to it.

    Args:
        options: Options of the run.
        owned: Names of files that the run overwrites.
    """

    def __init__(self, options: RunOptions, owned: tuple[str, ...]) -> None:
        self.path = Path(options.folder)
        self._options, self._owned = options, owned
        self._settings = options.settings()

    def check(self, *, any_saved: bool) -> None:
        """Raise ``RunError`` unless the run may start or resume here.

        Args:
            any_saved: Whether the folder holds checkpoints.
        """
        saved = read_settings(self.path)
        if self._options.resume:
            if saved is None and any_saved:
                path = settings_path(self.path)
                raise RunError(f"--resume: {path} is missing; restore it, or start elsewhere")
            if saved is None:
                raise RunError(f"--resume: {self.path} holds no run; leave it out")
            self.refuse_others(saved, self.path)
        elif any_saved:
            raise RunError(f"{self.path} holds a run; add --resume, or choose another --output")
        else:
            self._refuse_other_files(saved)

    def refuse_others(self, saved: Mapping[str, Any], where: Path) -> None:
        """Raise ``RunError`` if ``saved`` differs from the options of this run."""
        now, free = self._settings, self._options.free
        other = {k: v for k, v in saved.items() if k not in free and not _same(now.get(k), v)}
        if other:
            raise RunError(f"--resume: {where} was made with {other}; use the same")

    def _refuse_other_files(self, saved: Mapping[str, Any] | None) -> None:
        """Raise ``RunError`` if a file does not belong to a run with such options.

        A run killed before its first checkpoint leaves settings with all of these options.
        """
        if saved is None:
            taken = [name for name in self._owned if (self.path / name).exists()]
        else:
            taken = [] if saved.keys() >= self._settings.keys() else [settings_path(self.path).name]
        if taken:
            raise RunError(
                f"{self.path} holds {' and '.join(taken)} of something else, which a run would "
                "write over; move it away, or choose another --output"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and hold its lock, at most until the process ends.

        Raises:
            RunError: It cannot be written or locked, or another process has the lock.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / "lock").open("w")
        except OSError as error:
            raise RunError(f"--output {self.path} cannot be written: {error.strerror}") from None
        with file:
            try:
                lock(file.fileno())
            except (BlockingIOError, PermissionError):  # the latter on Windows
                raise RunError(
                    f"another process runs in {self.path}; wait for it, or choose another --output"
                ) from None
            except OSError as error:
                raise RunError(
                    f"--output {self.path} cannot be locked: {error.strerror}; choose a folder on "
                    "a disk of this machine"
                ) from None
            yield

    def write_settings(self) -> None:
        """Write the options of the run."""
        write_whole(settings_path(self.path), json.dumps(self._settings, indent=1))


def settings_path(folder: Path) -> Path:
    """Return the path of the file with the options that a run was last started with."""
    return folder / "settings.json"


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Return the options that the run in ``folder`` was last started with; ``None`` without one."""
    path = settings_path(folder)
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise RunError(f"{path} holds a {type(found).__name__}, expected the options of a run")
    return found


def _same(a: object, b: object) -> bool:
    """Whether two settings are equal; NaN equals NaN."""
    return a == b or json.dumps(a) == json.dumps(b)
