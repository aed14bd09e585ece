"""The replay buffer of a level: make it, select and write its rows, and undo a write."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from torchrl.data import (
    LazyTensorStorage,
    ReplayBuffer,
    RoundRobinWriter,
    TensorDictReplayBuffer,
    TensorStorage,
)
from torchrl.envs.transforms import MultiStepTransform

from layeredrl_torchrl._checks import check_instance, check_positive_int
from layeredrl_torchrl._state import empty_storage

__all__ = [
    "Overwritten",
    "make_buffer",
    "n_rows_along_time",
    "newest",
    "select_stored",
    "write",
]

_BUFFER_SIZE = 100_000
_REPLACE = "pass TensorDictReplayBuffer(storage=LazyTensorStorage(n)), or leave buffer out"


class _Storage(LazyTensorStorage):
    """A storage that takes the axes of its first rows, written or loaded.

    TorchRL's storage would take the environment axis of loaded data as part of single rows.
    """

    max_size: int

    def _init(self, data: TensorDictBase) -> None:
        self.ndim = 1 + data.ndim
        super()._init(data)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if self.initialized:
            self.ndim, n_lanes = self._storage.ndim, self._storage.shape[1:].numel()
            self.max_size = -(self.max_size // -n_lanes) * n_lanes  # as TorchRL rounds it
            self.__dict__.pop("_total_shape_value", None)


def make_buffer(buffer: ReplayBuffer | None, size: int | None, n_axes: int) -> ReplayBuffer:
    """Return ``buffer`` if a level can write to it, or make one for data of ``n_axes`` axes.

    Args:
        buffer: The user's buffer; ``None`` for a new one.
        size: Transitions that a new buffer can hold; 100,000 by default.
        n_axes: Axes of the data, ``[T]`` or ``[env, T]``.

    Raises:
        TypeError: Not a TorchRL buffer; a buffer without a tensor storage in this process, or with
            a writer that does not write row after row. ValueError: ``size`` together with
            ``buffer``; a transform that joins several steps.
    """
    if buffer is None:
        size = check_positive_int("buffer_size", _BUFFER_SIZE if size is None else size)
        return TensorDictReplayBuffer(storage=_Storage(size, ndim=n_axes))
    if size is not None:
        raise ValueError(f"buffer_size={size} has no effect with a buffer; leave it out")
    check_instance("buffer", buffer, ReplayBuffer, hint="a torchrl ReplayBuffer; " + _REPLACE)
    storage, writer = getattr(buffer, "storage", None), getattr(buffer, "writer", None)
    if not isinstance(storage, TensorStorage):
        raise TypeError(
            f"buffer is a {type(buffer).__name__} on a {type(storage).__name__}, but a level "
            f"writes to and learns from a storage of tensors in its own process; {_REPLACE}"
        )
    if not isinstance(writer, RoundRobinWriter):
        raise TypeError(
            f"buffer has a {type(writer).__name__}, but a level writes row after row, by a "
            f"RoundRobinWriter; {_REPLACE}. (Learn from a data set by predictor.learn.)"
        )
    if any(isinstance(part, MultiStepTransform) for part in buffer.transform):
        raise ValueError(
            "buffer has a MultiStepTransform, which joins several steps into one transition, but "
            "levels learn from single steps; leave it out"
        )
    return buffer


def n_rows_along_time(buffer: ReplayBuffer) -> int:
    """Return how many rows are stored, for each environment if the storage has several."""
    storage = buffer.storage
    return len(storage) // max(storage.shape[1:].numel(), 1) if len(storage) else 0


def select_stored(
    buffer: ReplayBuffer,
    data: TensorDictBase,
    required: Iterable[NestedKey],
    optional: Iterable[NestedKey],
    *,
    adapt: bool,
) -> TensorDictBase:
    """Return the entries of ``data`` to store, if they fit the rows stored before.

    The first data decides which of the optional entries are stored, and all later data must have
    the same ones: TorchRL would store zeros for missing entries.

    Args:
        buffer: The buffer for the data.
        data: ``[T]`` or ``[env, T]``, with all required entries.
        required: Entries that are always stored.
        optional: Entries that are stored if the first data has them.
        adapt: Whether the axes of an empty buffer may be adapted to those of the data.

    Raises:
        KeyError: Entries that only the stored rows or only ``data`` have.
        ValueError: Axes, a number of environments, shapes or dtypes that differ from before.
    """
    storage = buffer.storage
    if adapt:
        if not storage.initialized:
            storage.ndim = data.ndim
        # TorchRL reads the time axis from the storage only when the buffer is built.
        buffer._dim_extend = storage.ndim - 1
    if data.ndim != storage.ndim:
        raise ValueError(
            f"data has the batch shape {tuple(data.shape)}, but the buffer stores {storage.ndim} "
            "axes; build the level with env=, or pass buffer="
            f"TensorDictReplayBuffer(storage=LazyTensorStorage(n, ndim={data.ndim}))"
        )
    found = set(data.keys(True, True))
    wanted = {unravel_key(key) for key in required}
    wanted |= {key for key in map(unravel_key, optional) if key in found}
    if not storage.initialized:
        return data.select(*wanted)
    stored = storage[:]
    keys = set(stored.keys(True, True)) - {"index"}  # added by TorchRL
    # Nor entries that transforms of the buffer add, such as RelabelGoals.
    keys -= {key for part in buffer.transform for key in getattr(part, "added_keys", ())}
    if keys - found or wanted - keys:
        raise KeyError(
            f"data lacks {_names(keys - found)} and adds {_names(wanted - keys)}, compared with "
            "what the level stored before; give the same entries every time, or start with "
            "another buffer. Nothing of the data is stored"
        )
    # TorchRL swaps the first axis and the time axis when it stores data.
    before = stored.transpose(0, -1).batch_size[:-1] if stored.ndim > 1 else torch.Size()
    if before != data.batch_size[:-1]:
        raise ValueError(
            f"data has the batch shape {tuple(data.shape)}, but the buffer has "
            f"{tuple(before)} environments per step; use as many as before, or "
            "another level for them. Nothing of the data is stored"
        )
    for key in keys:
        has, got = stored.get(key), data.get(key)
        if (has.shape[storage.ndim :], has.dtype) != (got.shape[data.ndim :], got.dtype):
            raise ValueError(
                f"data has {key!r} of {tuple(got.shape[data.ndim :])} {got.dtype}, but what is "
                f"stored is {tuple(has.shape[storage.ndim :])} {has.dtype}; give the same every "
                "time. Nothing of the data is stored"
            )
    return data.select(*keys)


def _names(keys: Iterable[NestedKey]) -> str:
    return ", ".join(sorted(repr(key) for key in keys)) or "nothing"


def write(buffer: ReplayBuffer, rows: TensorDictBase) -> None:
    """Store ``rows [T]`` or ``[env, T]``."""
    rows = rows.detach()  # otherwise the storage would become part of the policy's graph
    device = buffer.storage.device
    if device not in (None, "auto"):
        rows = rows.to(device)
    # TensorDictReplayBuffer.extend also writes indices into the rows, which fails for [env, 1].
    ReplayBuffer.extend(buffer, rows)


def newest(buffer: ReplayBuffer, written: TensorDictBase, n: int | None) -> TensorDictBase:
    """Return rows after the buffer's transforms; the stored rows do not change.

    Args:
        buffer: A buffer with one axis.
        written: The newly written rows ``[N]``.
        n: How many of the newest to return, at most ``N``; ``None`` for all that are stored.
    """
    storage, transform = buffer.storage, buffer.transform
    if not len(transform):
        return storage[:] if n is None else written
    if n is None:
        index = torch.arange(len(storage))
    else:
        # If there were more rows than fit, only the last ones are left.
        ahead = torch.arange(-min(n, len(storage)), 0)
        index = (buffer.writer._cursor + ahead) % storage._storage.shape[0]
    return transform(storage[index])  # indexing copies


class Overwritten:
    """Remembers the rows that the next ``n_rows`` written rows overwrite.

    Args:
        buffer: A buffer on a tensor storage, with a ``RoundRobinWriter``.
        n_rows: Rows along all axes, or an upper bound.
    """

    def __init__(self, buffer: ReplayBuffer, n_rows: int) -> None:
        storage, writer = buffer.storage, buffer.writer
        self.buffer = buffer
        self.writer, self.length = writer.state_dict(), len(storage)
        self.was_made = storage.initialized
        self.last = storage._last_cursor
        self.index = self.rows = None
        if self.length:
            n_filled, capacity = n_rows_along_time(buffer), storage._storage.shape[0]
            ahead = torch.arange(min(n_rows, capacity))
            index = (self.writer["_cursor"] + ahead) % capacity
            self.index = index[index < n_filled]
            self.rows = storage._storage[self.index].clone()

    def put_back(self) -> None:
        """Restore the buffer, with at most ``n_rows`` rows written since."""
        storage = self.buffer.storage
        if self.index is not None and len(self.index):
            storage._storage[self.index] = self.rows
        storage._len, storage._last_cursor = self.length, self.last
        if storage.initialized and not self.was_made:
            # The next data may have other entries, axes and dtypes than the failed data.
            empty_storage(storage)
        self.buffer.writer.load_state_dict(self.writer)
