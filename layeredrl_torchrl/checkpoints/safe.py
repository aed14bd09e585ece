"""Checkpoints that are verified before reading and never unpickle anything."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.checkpoint import (
    Checkpoint,
    CheckpointAdapter,
    CheckpointError,
    CheckpointLoadResult,
    CheckpointOptions,
    JSONCheckpointAdapter,
)
from torchrl.data import ReplayBuffer

from layeredrl_torchrl.checkpoints._buffers import BufferAdapter
from layeredrl_torchrl.checkpoints._undo import undone_in_part
from layeredrl_torchrl.checkpoints._values import ValueAdapter

__all__ = ["SafeCheckpoint"]

_CHECKSUMS = "checksums.json"
_BLOCK = 4096  # least bytes of a file on a disk
# What file managers leave in folders that they show; nothing reads it.
_STRAY = (".DS_Store", "Thumbs.db", "desktop.ini")
# TorchRL and tensordict read these without running code from them.
_KINDS = (".json", ".memmap")
_TYPES = {
    f"<class 'tensordict.{name}'>"
    for name in (
        "_td.TensorDict",
        "_lazy.LazyStackedTensorDict",
        "tensorclass.NonTensorData",
        "tensorclass.NonTensorStack",
    )
}


class SafeCheckpoint(Checkpoint):
    """TorchRL's ``Checkpoint`` with checksums and without pickles.

    At the end, :meth:`save` writes the sizes and SHA-256 sums of all files. :meth:`load` verifies
    them before it reads anything else, and refuses files that need unpickling, since pickles can
    run any code. Replay buffers, also empty ones, are saved without TorchRL's ``prefetch.pkl``.
    Plain values keep tensors, tuples and keys.

    >>> net = torch.nn.Linear(2, 1)
    >>> path = SafeCheckpoint(net=net).save("checkpoint", metadata={"step": 3})
    >>> with open("checkpoint/components/0000-net/state.json", "a") as file:
    ...     _ = file.write(" ")
    >>> SafeCheckpoint(net=net).load("checkpoint")
    Traceback (most recent call last):
    torchrl.checkpoint._checkpoint.CheckpointError: ...state.json is ... bytes long, expected ...

    Args:
        strict: See ``Checkpoint``.
        save_components: See ``Checkpoint``.
        **components: Modules, optimizers, replay buffers, plain values (numbers, texts and
            tensors, also in lists and dictionaries), and objects with ``state_dict`` and
            ``load_state_dict``.

    Raises:
        ValueError: ``format="archive"``; only directories are supported.
    """

    def __init__(
        self,
        *,
        strict: str = "error",
        save_components: Collection[str] | None = None,
        **components: Any,
    ) -> None:
        if "format" in components:
            raise ValueError(f"format must be 'directory', got {components['format']!r}")
        super().__init__(strict=strict, save_components=save_components, **components)
        self.register_adapter(ReplayBuffer, BufferAdapter())

    def save(
        self,
        path: str | Path,
        *,
        components: Collection[str] | None = None,
        component_options: Mapping[str, CheckpointOptions] | None = None,
        format: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Path:
        """Save the components with their checksums, atomically; return the path.

        Raises:
            ValueError: ``format="archive"``.
            CheckpointError: Too little space on the disk (checked before writing, since writing a
                memory map to a full disk kills the process), or a component that can only be
                pickled.
        """
        if format not in (None, "directory"):
            raise ValueError(f"format must be 'directory', got {format!r}")
        destination = Path(path).expanduser().absolute()
        destination.parent.mkdir(parents=True, exist_ok=True)
        self._check_room(destination, components)
        hidden = f".{destination.name}.{{}}-{uuid.uuid4().hex}"
        stage, old = (destination.with_name(hidden.format(what)) for what in ("stage", "delete"))
        try:
            super().save(
                stage,
                components=components,
                component_options=component_options,
                metadata=metadata,
            )
            _check_kinds(stage, "cannot be saved")
            _write_checksums(stage)
            if destination.exists():
                os.replace(destination, old)
            os.replace(stage, destination)
        finally:
            for path in (stage, old):
                self._remove_path(path)  # a folder, or a file in its place
        return destination

    def load(self, path: str | Path, **options: Any) -> CheckpointLoadResult:
        """Verify a checkpoint, then load it; ``options`` are those of ``Checkpoint.load``.

        Raises:
            CheckpointError: As :meth:`verify`, before anything is loaded; a component that does not
                fit. After any error all components are as before.
        """
        self.verify(path)
        names = options.get("components")
        names = self.components if names is None else names
        with undone_in_part(self.components[name] for name in names if name in self):
            result: CheckpointLoadResult = super().load(path, **options)
        return result

    @staticmethod
    def verify(path: str | Path) -> None:
        """Check all files of a checkpoint against their checksums, and refuse pickles.

        Raises:
            FileNotFoundError: There is no checkpoint.
            CheckpointError: A file that is missing, changed, unexpected, of another size, or of a
                kind that can run code; the message names it.
        """
        root = Path(path).expanduser().absolute()
        if not root.exists():
            raise FileNotFoundError(f"there is no checkpoint at {root}")
        _check_kinds(root, "is not loaded")
        expected = _read_checksums(root)
        found = {file.relative_to(root).as_posix() for file in _files(root)} - {_CHECKSUMS}
        for name in sorted(found - expected.keys()):
            raise CheckpointError(f"{root / name} is not part of the checkpoint; remove it")
        for name, (size, digest) in sorted(expected.items()):
            file, instead = root / name, "use another checkpoint, this one is damaged"
            if name not in found:
                raise CheckpointError(f"{file} is missing; {instead}")
            if file.stat().st_size != size:
                raise CheckpointError(
                    f"{file} is {file.stat().st_size} bytes long, expected {size}; {instead}"
                )
            if _digest(file) != digest:
                raise CheckpointError(f"{file} does not match its checksum; {instead}")
            if file.name == "meta.json":
                _check_types(file)

    def _resolve_adapter(self, component: Any) -> CheckpointAdapter:
        adapter: CheckpointAdapter = super()._resolve_adapter(component)
        return ValueAdapter() if type(adapter) is JSONCheckpointAdapter else adapter

    def _check_room(self, destination: Path, components: Collection[str] | None) -> None:
        selected = self.components.keys() if components is None else components
        needed = sum(_size(self.components[name]) for name in selected if name in self)
        free = shutil.disk_usage(destination.parent).free
        if needed > free:
            raise CheckpointError(
                f"no room for the checkpoint {destination}: it takes {needed / 1e6:.1f} MB and "
                f"{free / 1e6:.1f} MB are free; make room, or choose another disk. Earlier "
                "checkpoints are unchanged"
            )


def _files(root: Path) -> Iterator[Path]:
    found = (path for path in root.rglob("*") if path.is_symlink() or not path.is_dir())
    return (path for path in found if path.name not in _STRAY)


def _check_kinds(root: Path, what: str) -> None:
    for file in _files(root):
        if file.is_symlink() or file.suffix not in _KINDS:
            raise CheckpointError(
                f"{file} {what}: only JSON and memory-mapped tensors can be read without running "
                "code, which pickles and links may do; save tensors and plain values only"
            )


def _check_types(file: Path) -> None:
    found = json.loads(file.read_bytes())
    kind = found.get("_type") if isinstance(found, dict) else type(found).__name__
    if kind not in _TYPES:
        raise CheckpointError(f"{file} is not loaded: its type is {kind}, expected a TensorDict")


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _seal(files: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _write_checksums(root: Path) -> None:
    sums = {
        file.relative_to(root).as_posix(): [file.stat().st_size, _digest(file)]
        for file in _files(root)
        if file != root / _CHECKSUMS
    }
    with (root / _CHECKSUMS).open("w") as opened:
        json.dump({"files": sums, "seal": _seal(sums)}, opened, indent=1)
        opened.flush()
        os.fsync(opened.fileno())


def _read_checksums(root: Path) -> dict[str, tuple[int, str]]:
    path = root / _CHECKSUMS
    try:
        found = json.loads(path.read_bytes())
        files: dict[str, tuple[int, str]] = found["files"]
        sound = _seal(files) == found["seal"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: not a checkpoint that SafeCheckpoint has written, or one that was "
            "not finished"
        ) from None
    except (ValueError, KeyError, TypeError, NotADirectoryError):
        sound, files = False, {}
    if not sound:
        raise CheckpointError(f"{path} is damaged; use another checkpoint")
    return files


def _size(value: Any) -> int:
    """Return an upper estimate of the bytes that a component takes on disk."""
    if isinstance(value, ReplayBuffer):
        return _size(value.storage[:]) + 8 * _BLOCK if len(value) else _BLOCK
    if isinstance(value, torch.Tensor | np.ndarray):
        return int(value.nbytes) + _BLOCK
    if isinstance(value, TensorDictBase):
        return sum(_size(leaf) for leaf in value.values(True, True)) + _BLOCK
    if isinstance(value, Mapping):
        return sum(_size(item) + len(str(key)) + 64 for key, item in value.items())
    if isinstance(value, list | tuple):
        return sum(map(_size, value))
    if isinstance(value, str | bytes):
        return 2 * len(value) + 64
    if value is None or isinstance(value, int | float):
        return 64
    state = getattr(value, "state_dict", None)
    return _BLOCK + (_size(state()) if callable(state) else 0)
