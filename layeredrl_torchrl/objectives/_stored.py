"""The stored transitions of a TorchRL replay buffer, checked and read by their place.

Axis letters are those of ``slices.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from tensordict import NestedKey, TensorDictBase, is_leaf_nontensor
from torch import Tensor
from torchrl.data import (
    LazyTensorStorage,
    RandomSampler,
    RayReplayBuffer,
    ReplayBuffer,
    RoundRobinWriter,
    SamplerWithoutReplacement,
    SliceSampler,
    SliceSamplerWithoutReplacement,
    TensorDictReplayBuffer,
    TensorStorage,
)

__all__ = ["StoredRows", "any_in_row", "check_single_steps", "rows_at", "take"]

# Uniform samplers. They are not used, since slices draw uniformly themselves.
_UNIFORM = (RandomSampler, SamplerWithoutReplacement, SliceSampler, SliceSamplerWithoutReplacement)


class StoredRows:
    """Reads the storage of a buffer that another thread or process may be extending.

    Args:
        buffer: The buffer.
        keys: Entries that its rows must have.
        flags: Those of ``keys`` that must be boolean.

    Raises:
        TypeError: Not a replay buffer on a tensor or memory-mapped storage, or one whose sampler
            chooses or changes transitions.
        ValueError: A storage of several dimensions that was made from data.
    """

    def __init__(
        self, buffer: ReplayBuffer, keys: Sequence[NestedKey], flags: Sequence[NestedKey]
    ) -> None:
        if not isinstance(buffer, ReplayBuffer):
            raise TypeError(
                f"buffer: got {type(buffer).__name__}, expected a torchrl.data.ReplayBuffer; "
                "extend one with the collected transitions and pass it here."
            )
        if not isinstance(buffer, RayReplayBuffer):
            _check_storage(buffer.storage)
        _check_sampling(buffer)
        self.buffer, self._keys, self._flags = buffer, list(keys), list(flags)

    def __len__(self) -> int:
        """Number of filled places."""
        return len(self.buffer.storage)

    @property
    def n_written(self) -> int:
        """Number of transitions ever written; see :class:`TransitionSlices`."""
        storage = _check_storage(self.buffer.storage)
        stored = len(storage)
        # TorchRL counts rows along time; each holds a transition for every lane.
        lanes = stored // max(storage.shape[0], 1) if stored and storage.ndim > 1 else 1
        # The writer of a read-only data set has no count.
        written = getattr(self.buffer.writer, "_write_count", 0)
        return max(int(written) * lanes, stored)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Block writers, with the locks that ``buffer.sample`` takes."""
        with self.buffer._replay_lock, self.buffer._write_lock:
            yield

    def contents(self, length: int) -> tuple[TensorDictBase, int]:
        """Return the whole memory ``[T_max, (E)]``, checked, and the number of its filled rows.

        Args:
            length: Minimum number of rows along time.

        Raises:
            TypeError, ValueError, KeyError: As ``TransitionSlices.sample``.
        """
        storage = _check_storage(self.buffer.storage)
        if not len(storage):
            raise ValueError("buffer: got an empty one, expected transitions; extend it first.")
        # Indexing a storage cuts every entry to its filled part, which takes longer than copying
        # the rows. But it is the only way to open a storage that another process filled.
        contents = storage._storage if storage.initialized else storage[:]
        if not isinstance(contents, TensorDictBase):
            raise TypeError(
                f"buffer: got one that stores {type(contents).__name__}, expected TensorDicts of "
                "one-step transitions; extend it with the batches of a collector."
            )
        if contents.batch_dims != storage.ndim:
            raise ValueError(
                f"buffer: got items of shape {list(contents.batch_size[storage.ndim :])} in a "
                f"storage of ndim={storage.ndim}, expected single transitions; for [env, time] "
                f"batches use {type(storage).__name__}(max_size, ndim={contents.batch_dims})."
            )
        n_rows = len(storage) // contents.batch_size[1:].numel()
        if n_rows < length:
            raise ValueError(
                f"buffer: got {n_rows} rows along time, expected at least length={length}; "
                "collect more, or sample shorter slices."
            )
        for key in self._keys:
            if contents.get(key, None) is None:
                names = sorted(map(str, contents.keys(include_nested=True, leaves_only=True)))
                if key == self._keys[1]:  # the observation itself is there
                    raise KeyError(
                        f"buffer: got {self._keys[0]!r} without {key!r}, where each step leads. "
                        "Collectors with compact_obs=True leave it out, and the last one of an "
                        "episode cannot be restored: build the collector without, or name another "
                        f"key. Available: {', '.join(names)}."
                    )
                raise KeyError(
                    f"buffer: got none of the key {key!r}, expected one-step transitions with it; "
                    f"pass the key it has here. Available: {', '.join(names)}."
                )
        for key in self._flags:
            dtype = contents.get(key).dtype
            if dtype != torch.bool:
                raise ValueError(
                    f"buffer: got {key!r} of {dtype}, expected torch.bool, for events and "
                    "not their probabilities; convert it before extending the buffer."
                )
        return contents, n_rows

    def newest(self, n_rows: int, capacity: int) -> int:
        """Return the position along time of the row that was written last.

        Args:
            n_rows: Filled rows along time.
            capacity: All rows along time.
        """
        if n_rows < capacity:
            return n_rows - 1
        # The writer's cursor is saved and loaded with the buffer, the storage's is not. But the
        # writer has not moved if another buffer on the same storage writes.
        writer = self.buffer.writer
        if isinstance(writer, RoundRobinWriter) and self.buffer.write_count:
            return int(writer._cursor - 1) % capacity
        newest = self.buffer.storage._last_cursor_index
        # A data set that was stored in one piece has no cursor.
        return n_rows - 1 if newest is None else int(newest)


def _check_sampling(buffer: ReplayBuffer) -> None:
    """Refuse buffers with their own drawing or relabelling, since slices would skip it."""
    if isinstance(buffer, RayReplayBuffer):
        raise TypeError(
            "buffer: got a RayReplayBuffer, whose storage is in another process, expected a "
            "buffer of this one; extend a TensorDictReplayBuffer(storage=LazyTensorStorage(n)) "
            "with its content."
        )
    # Hindsight buffers relabel in their own method; others leave it to the sampler.
    plain = (ReplayBuffer._sample, TensorDictReplayBuffer._sample)
    if type(buffer)._sample in plain and type(buffer.sampler) in _UNIFORM:
        return
    raise TypeError(
        f"buffer: got a {type(buffer).__name__} with a {type(buffer.sampler).__name__}, which "
        "chooses or relabels what it samples, expected uniform sampling: slices and learn() "
        "sample on their own. Pass a second buffer on the same storage, "
        "TensorDictReplayBuffer(storage=buffer.storage), or store what is relabelled."
    )


def _check_storage(storage: object) -> TensorStorage:
    if not isinstance(storage, TensorStorage):
        raise TypeError(
            f"buffer: got one on a {type(storage).__name__}, expected a storage of tensors; use "
            "LazyTensorStorage or LazyMemmapStorage, and of an ensemble pass one of its buffers."
        )
    if storage.ndim > 1 and not isinstance(storage, LazyTensorStorage):
        raise ValueError(
            f"buffer: got one on a {type(storage).__name__} made from data with "
            f"ndim={storage.ndim}, whose rows TorchRL miscounts, expected one that its buffer "
            f"filled; use LazyTensorStorage(max_size, ndim={storage.ndim}) and extend the buffer "
            "with the data, time last."
        )
    return storage


def check_single_steps(rows: TensorDictBase) -> None:
    """Raise ``ValueError`` for rows that span several steps: their rewards are sums."""
    spans = rows.get("steps_to_next_obs", None)
    if spans is not None and bool((spans > 1).any()):
        raise ValueError(
            f"buffer: got transitions of up to {int(spans.max())} steps ('steps_to_next_obs', "
            "which MultiStep writes), expected one step each; leave MultiStep out, targets over "
            "several steps are made from slices (n_steps= of RewardPredictor)."
        )


def rows_at(contents: TensorDictBase, index: Tensor) -> TensorDictBase:
    """Copy the rows at flat ``index`` [B, L]."""
    return contents.apply(
        lambda leaf: take(leaf, index, contents.batch_dims),
        batch_size=index.shape,
        is_leaf=is_leaf_nontensor,
    )


def take(leaf: Tensor, index: Tensor, ndim: int) -> Tensor:
    """Copy the rows at flat ``index`` [B, L] of ``leaf`` [T, (E,) ...] to [B, L, ...]."""
    # Text; and leaves that are not contiguous, since flattening would copy them completely.
    if not isinstance(leaf, Tensor) or (ndim > 1 and not leaf.is_contiguous()):
        return leaf[torch.unravel_index(index, leaf.shape[:ndim])]
    # index_select is several times faster than indexing for wide rows, and for single numbers of a
    # source with one dimension.
    width = leaf.shape[ndim:]
    source = leaf.view(-1) if width.numel() == 1 else leaf.flatten(0, ndim - 1)
    return source.index_select(0, index.view(-1)).view(index.shape + width)


def any_in_row(rows: Tensor) -> Tensor:
    """Reduce [B, L, ...] to [B, L]: whether anything in a row is True."""
    if rows.shape[2:].numel() == 1:
        return rows.reshape(rows.shape[:2])
    return rows.flatten(2).any(-1)
