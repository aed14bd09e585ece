"""Replay buffers in checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, is_tensor_collection
from torchrl.checkpoint import (
    CheckpointAdapter,
    CheckpointError,
    StateDictCheckpointAdapter,
)
from torchrl.data.replay_buffers.checkpointers import TensorStorageCheckpointer

_ROWS, _EMPTY, _TRANSFORM = "rows.json", "empty.json", "transform"


class _FilledRows(TensorStorageCheckpointer):
    """Saves only the filled rows of a storage; TorchRL's version saves its whole memory."""

    def dumps(self, storage: Any, path: str | Path) -> None:
        rows = storage._len_along_dim0
        storage._storage[:rows].memmap(path, copy_existing=True)
        with (Path(path) / _ROWS).open("w") as file:
            room = len(storage._storage)
            json.dump({"rows": rows, "len": storage._len, "room": room}, file)

    def loads(self, storage: Any, path: str | Path) -> None:
        saved = json.loads((Path(path) / _ROWS).read_bytes())
        data, rows = TensorDict.load_memmap(path, allow_pickle=False), saved["rows"]
        if not storage.initialized:
            storage._init(data[0])
        if len(storage._storage) < rows:
            raise CheckpointError(
                f"the buffer has room for {len(storage._storage)} rows, saved were {rows}"
            )
        storage._storage[:rows] = data
        storage._len = saved["len"]


@contextmanager
def _filled_rows(storage: Any) -> Iterator[None]:
    """Save and load a storage of a TensorDict with :class:`_FilledRows` in the block."""
    own = storage.checkpointer
    if type(own) is TensorStorageCheckpointer and not own._save_hooks + own._load_hooks:
        storage.checkpointer = _FilledRows()
    try:
        yield
    finally:
        storage.checkpointer = own


def _unroll(buffer: Any, saved: Path) -> None:
    """Continue after the last row if a full ring was loaded into a larger storage.

    Otherwise the writer would continue at the ring's oldest row, and the rows after the ring would
    count as written.
    """
    storage, writer = buffer.storage, buffer.writer
    if not saved.exists() or not hasattr(writer, "_cursor"):
        return
    found = json.loads(saved.read_bytes())
    rows, room = found["rows"], found.get("room", found["rows"])
    if rows < room or len(storage._storage) == room:
        return
    data, oldest = storage._storage[:rows], writer._cursor
    data.copy_(torch.cat((data[oldest:], data[:oldest])))
    writer._cursor = rows


class BufferAdapter(CheckpointAdapter):
    """Saves the same as TorchRL's ``ReplayBuffer.dump``, without pickles.

    TorchRL pickles prefetched batches (``prefetch=``), which this class refuses, and the state of
    transforms, which it saves like that of a module. Empty buffers can be saved too.
    """

    adapter_id = "layeredrl_torchrl.buffer"

    def save(
        self, component: Any, path: Path, *, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Save a buffer under ``path``; ``CheckpointError`` if it would need a pickle."""
        self._check(component)
        path.mkdir(parents=True, exist_ok=True)
        with (path / _EMPTY).open("w") as file:
            json.dump(not len(component), file)
        if not len(component):
            return
        with _filled_rows(component.storage):
            component.dump(path, *args, **kwargs)
        (path / "prefetch.pkl").unlink(missing_ok=True)
        if (path / "transform.t").exists():
            (path / "transform.t").unlink()
            StateDictCheckpointAdapter().save(
                component.transform, path / _TRANSFORM, args=(), kwargs={}
            )

    def load(
        self,
        component: Any,
        path: Path,
        *,
        map_location: Any,
        tensor_load_kwargs: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Restore a buffer from ``path``."""
        self._check(component)
        if json.loads((path / _EMPTY).read_bytes()):
            if len(component):
                component.empty()
            return
        with _filled_rows(component.storage):
            component.load(path, *args, **kwargs)
        _unroll(component, path / "storage" / _ROWS)
        if (path / _TRANSFORM).exists():
            StateDictCheckpointAdapter().load(
                component.transform,
                path / _TRANSFORM,
                map_location=map_location,
                tensor_load_kwargs=tensor_load_kwargs,
                args=(),
                kwargs={},
            )

    def _check(self, buffer: Any) -> None:
        checkpointer = buffer.storage.checkpointer
        if not isinstance(checkpointer, TensorStorageCheckpointer):
            raise CheckpointError(
                f"a buffer whose storage is a {type(buffer.storage).__name__} cannot be saved "
                "without running code at loading; use LazyTensorStorage or LazyMemmapStorage"
            )
        rows = getattr(buffer.storage, "_storage", None)
        if rows is not None and not is_tensor_collection(rows):
            raise CheckpointError(
                f"a buffer of {type(rows).__name__}s cannot be loaded into an empty one; store "
                "TensorDicts"
            )
        if getattr(buffer, "_prefetch", False):
            raise CheckpointError(
                "a buffer that draws batches ahead cannot be saved without a pickle; build it "
                "without prefetch="
            )
