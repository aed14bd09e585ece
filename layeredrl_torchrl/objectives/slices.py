"""Uniformly drawn slices of consecutive transitions from a TorchRL replay buffer.

Axis letters: ``B`` slices, ``L`` steps in a slice, ``T`` rows of the storage along time, ``E``
lanes of the storage (environments that stepped side by side; absent if it has one dimension).
"""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDictBase, is_leaf_nontensor, unravel_key
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

from layeredrl_torchrl._checks import check_positive_int

__all__ = ["TransitionSlices"]

# Samplers without preferences; slices are drawn uniformly by themselves.
_UNIFORM = (RandomSampler, SamplerWithoutReplacement, SliceSampler, SliceSamplerWithoutReplacement)


class TransitionSlices:
    """Draws slices of consecutive transitions; every stored one is equally likely to start a slice.

    The buffer holds one-step transitions as TorchRL's collectors lay them out, in a tensor or
    memory-mapped storage of one dimension or of several (time first, as
    ``LazyTensorStorage(n, ndim=2)`` stores the collectors' ``[env, time]`` batches). A stored row
    is continued by the next one along time if it

    - is not done and not terminated,
    - is not the newest row, which in a full ring is followed by the oldest,
    - has the trajectory id of the next row, where the buffer stores ids,
    - is not followed by padding, and
    - leads to the observation that the next row starts from.

    Padding, which TorchRL marks as false in ``("collector", "mask")``, never starts a slice either.

    The last condition needs no bookkeeping, so it also tells apart what the others miss: batches
    flattened over environments, collectors whose ids collide, a run that was cut and resumed.

    Sampling reads ``B * L`` rows, whatever the buffer holds, and changes neither the buffer nor its
    sampler and priorities. What is written later is seen: the buffer may still be empty here.

    >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
    >>> buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100))
    >>> obs, done = torch.arange(6.0).unsqueeze(-1), torch.zeros(6, 1, dtype=torch.bool)
    >>> after = {"observation": obs + 1, "done": done, "terminated": done}
    >>> _ = buffer.extend(TensorDict({"observation": obs, "next": after}, [6]))
    >>> slices = TransitionSlices(buffer).sample(32, length=3)
    >>> slices.shape, bool(slices["valid"].all())  # some begin too late for three steps
    (torch.Size([32, 3]), False)

    Args:
        buffer: The buffer to read. Its transforms are applied to what is sampled, in a batch of
            shape ``[B * L]`` as in ``buffer.sample``; slices end where the stored rows say.
        observation_key: Key of the observation. ``("next", observation_key)`` is the next one.
        done_key: Key of the end of an episode, bool ``[T, (E,) 1]``.
        terminated_key: Key of termination, laid out like ``done_key``.
        trajectory_key: Key of the trajectory ids, if the buffer has any; None to ignore them.
        mask_key: Key of the mask that is false for padding, if the buffer has one.
        valid_key: Key under which :meth:`sample` says which steps belong to the slice.
        index_key: Key under which :meth:`sample` says where in the storage, seen flat, each step
            lies, int64 ``[B, L]``; ``None`` to leave it out.

    Raises:
        TypeError: If ``buffer`` is not a replay buffer on a tensor or memory-mapped storage, or
            one whose sampler chooses or changes transitions, as those of prioritised and
            hindsight buffers do.
        ValueError: If that storage has several dimensions and was made from data.
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        *,
        observation_key: NestedKey = "observation",
        done_key: NestedKey = ("next", "done"),
        terminated_key: NestedKey = ("next", "terminated"),
        trajectory_key: NestedKey | None = ("collector", "traj_ids"),
        mask_key: NestedKey | None = ("collector", "mask"),
        valid_key: NestedKey = "valid",
        index_key: NestedKey | None = None,
    ) -> None:
        if not isinstance(buffer, ReplayBuffer):
            raise TypeError(
                f"buffer: got {type(buffer).__name__}, expected a torchrl.data.ReplayBuffer; "
                "extend one with the collected transitions and pass it here."
            )
        if not isinstance(buffer, RayReplayBuffer):
            _check_storage(buffer.storage)
        _check_sampling(buffer)
        self._buffer = buffer
        self._observation_key = observation_key
        self._next_observation_key: NestedKey = unravel_key(("next", observation_key))
        self._end_keys = (done_key, terminated_key)
        self._trajectory_key = trajectory_key
        self._mask_key = mask_key
        self._valid_key = valid_key
        self._index_key = index_key

    def __len__(self) -> int:
        """Number of places that are filled; each may start a slice unless it is padding."""
        return len(self._buffer.storage)

    @property
    def n_written(self) -> int:
        """Number of transitions ever written, overwritten ones included.

        What another process or an earlier run wrote counts as far as it is still stored.
        """
        storage = _check_storage(self._buffer.storage)
        stored = len(storage)
        # TorchRL counts what is written along time; of each, a storage of several dimensions
        # holds one for every lane.
        lanes = stored // max(storage.shape[0], 1) if stored and storage.ndim > 1 else 1
        # A data set that cannot be written to does not count.
        written = getattr(self._buffer.writer, "_write_count", 0)
        return max(int(written) * lanes, stored)

    def sample(
        self, batch_size: int, length: int, generator: torch.Generator | None = None
    ) -> TensorDictBase:
        """Draws slices with replacement, their first transitions uniform over all stored ones.

        Args:
            batch_size: Number of slices ``B``.
            length: Number of steps ``L`` of a slice.
            generator: Source of randomness, on the storage's device; torch's global one if None.

        Returns:
            TensorDict of shape ``[B, L]`` with all stored keys, as the buffer's transforms leave
            them, and ``valid_key``, bool ``[B, L]``: True up to the last step that continues the
            episode of the slice's first transition. The first step is always valid; the steps after
            the last valid one repeat it.

        Raises:
            TypeError: If a count is not an integer or the buffer does not store TensorDicts.
            ValueError: If a count is below 1, the buffer is empty or holds fewer than ``length``
                rows along time, what ends an episode is not boolean, items are no single
                transitions, a transform changes the batch's shape, or ``valid_key`` is taken.
            KeyError: If a key is missing from the buffer.
        """
        check_positive_int("batch_size", batch_size)
        check_positive_int("length", length)
        # The locks that `buffer.sample` takes, as another thread or process may be extending the
        # buffer: what is copied must be what was looked at.
        with self._buffer._replay_lock, self._buffer._write_lock:
            rows, valid, index = self._read(batch_size, length, generator)
        _check_single_steps(rows)
        transform = self._buffer.transform
        if len(transform):
            shape = (batch_size * length,)
            flat = transform(rows.reshape(shape))
            if flat.batch_size != shape:
                raise ValueError(
                    f"The buffer's transform turned a batch of shape {list(shape)} into one of "
                    f"{list(flat.batch_size)}, expected as many rows as went in; use a buffer "
                    "without the transform that changes their number."
                )
            rows = flat.reshape(batch_size, length)
        added = {"valid_key": (self._valid_key, valid), "index_key": (self._index_key, index)}
        for name, (key, value) in added.items():
            if key is None:
                continue
            if rows.get(key, None) is not None:
                raise ValueError(
                    f"{name}: got {key!r}, which the buffer's rows already have, expected an "
                    f"unused key; pass another {name}."
                )
            rows.set(key, value)
        return rows

    def stored(self, index: Tensor) -> TensorDictBase:
        """The rows ``[N]`` at places ``index [N]`` of the storage, seen flat, as they are stored.

        Raises:
            As :meth:`sample`.
        """
        with self._buffer._replay_lock, self._buffer._write_lock:
            contents, _ = self._contents(1)
            place = index.to(contents.get(self._end_keys[0]).device)
            return _rows(contents, place.unsqueeze(1))[:, 0]

    def _read(
        self, batch_size: int, length: int, generator: torch.Generator | None
    ) -> tuple[TensorDictBase, Tensor, Tensor]:
        """The stored rows of freshly drawn slices, which of them are valid, and where they lie.

        All three are of shape [B, L].
        """
        contents, n_rows = self._contents(length)
        ends = [contents.get(key) for key in self._end_keys]
        steps = torch.arange(length, device=ends[0].device)

        # With time as the first dimension, lanes lie interleaved in memory: seen flat, the next row
        # of a lane is as many rows further on as there are lanes, modulo the ring.
        n_lanes = contents.batch_size[1:].numel()
        n_stored = n_rows * n_lanes
        mask = None if self._mask_key is None else contents.get(self._mask_key, None)
        start = self._starts(mask, n_stored, batch_size, generator, steps.device)
        index = (start + n_lanes * steps) % n_stored
        if length == 1:  # nothing is continued
            return _copy(contents, index, index[:, 1:].bool())

        newest = _newest_row(self._buffer, n_rows, capacity=contents.batch_size[0])
        until_newest = (newest - start.div(n_lanes, rounding_mode="floor")) % n_rows  # [B, 1]
        continues = steps[:-1] < until_newest  # [B, L - 1], like all that compares neighbours
        for end in ends:
            continues &= ~_any(_take(end, index, contents.batch_dims))[:, :-1]
        if mask is not None:
            continues &= _any(_take(mask, index, contents.batch_dims))[:, 1:]
        if self._trajectory_key is not None:
            trajectory = contents.get(self._trajectory_key, None)
            if trajectory is not None:
                ids = _take(trajectory, index, contents.batch_dims)
                continues &= ~_any(ids[:, 1:] != ids[:, :-1])

        # Observations are wide: they are compared in what is copied anyway, and all is copied once
        # more in the rare case that nothing else told two episodes apart.
        rows, valid, held = _copy(contents, index, continues)
        reached = rows.get(self._next_observation_key)[:, :-1]
        breaks = _any(reached != rows.get(self._observation_key)[:, 1:])
        if (breaks & valid[:, 1:]).any():
            rows, valid, held = _copy(contents, index, continues & ~breaks)
        return rows, valid, held

    @staticmethod
    def _starts(
        mask: Tensor | None,
        n_stored: int,
        batch_size: int,
        generator: torch.Generator | None,
        device: torch.device,
    ) -> Tensor:
        """Flat indices [B, 1] of first transitions, uniform over those that are no padding."""
        shape = (batch_size, 1)
        if mask is None:
            return torch.randint(n_stored, shape, generator=generator, device=device)
        real = mask.reshape(-1)[:n_stored].nonzero().squeeze(-1)
        if not len(real):
            raise ValueError(
                f"buffer: got {n_stored} rows of padding and no transition; check its mask."
            )
        return real[torch.randint(len(real), shape, generator=generator, device=device)]

    def _contents(self, length: int) -> tuple[TensorDictBase, int]:
        """The storage's whole memory [T_max, (E)], checked, and how many of its rows are filled."""
        storage = _check_storage(self._buffer.storage)
        if not len(storage):
            raise ValueError("buffer: got an empty one, expected transitions; extend it first.")
        # Indexing a storage first cuts every entry to its filled part, which takes longer than
        # copying the rows does. One that another process filled opens its memory only that way.
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
        for key in (self._observation_key, self._next_observation_key, *self._end_keys):
            if contents.get(key, None) is None:
                names = sorted(map(str, contents.keys(include_nested=True, leaves_only=True)))
                raise KeyError(
                    f"buffer: got none of the key {key!r}, expected one-step transitions with it; "
                    f"pass the key it has here. Available: {', '.join(names)}."
                )
        for key in self._end_keys:
            dtype = contents.get(key).dtype
            if dtype != torch.bool:
                raise ValueError(
                    f"buffer: got {key!r} of {dtype}, expected torch.bool, for what happened and "
                    "not how likely it was; convert it before extending the buffer."
                )
        return contents, n_rows


def _check_sampling(buffer: ReplayBuffer) -> None:
    """Refuse what draws or relabels in its own way: it would be passed over."""
    if isinstance(buffer, RayReplayBuffer):
        raise TypeError(
            "buffer: got a RayReplayBuffer, whose storage lies in another process, expected a "
            "buffer of this one; extend a TensorDictReplayBuffer(storage=LazyTensorStorage(n)) "
            "with what it holds."
        )
    # Hindsight buffers relabel in a method of their own; others leave it to the sampler.
    plain = (ReplayBuffer._sample, TensorDictReplayBuffer._sample)
    if type(buffer)._sample in plain and type(buffer.sampler) in _UNIFORM:
        return
    raise TypeError(
        f"buffer: got a {type(buffer).__name__} with a {type(buffer.sampler).__name__}, which "
        "chooses or relabels what it samples, expected uniform sampling: slices and learn() draw "
        "by themselves. Pass a second buffer on the same storage, "
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


def _check_single_steps(rows: TensorDictBase) -> None:
    """Raise for rows that span several steps: their rewards are sums."""
    spans = rows.get("steps_to_next_obs", None)
    if spans is not None and bool((spans > 1).any()):
        raise ValueError(
            f"buffer: got transitions of up to {int(spans.max())} steps ('steps_to_next_obs', "
            "which MultiStep writes), expected one step each; leave MultiStep out, targets over "
            "several steps are made from slices (n_steps= of RewardPredictor)."
        )


def _newest_row(buffer: ReplayBuffer, n_rows: int, capacity: int) -> int:
    """Position along time of the row that was written last."""
    if n_rows < capacity:
        return n_rows - 1
    writer = buffer.writer
    # The writer's cursor is saved and loaded with the buffer, the storage's is not. But the writer
    # of a buffer that only reads what another buffer on the same storage writes has never moved.
    if isinstance(writer, RoundRobinWriter) and buffer.write_count:
        return int(writer._cursor - 1) % capacity
    newest = buffer.storage._last_cursor_index
    return n_rows - 1 if newest is None else int(newest)  # None: a data set that came as a whole


def _copy(
    contents: TensorDictBase, index: Tensor, continues: Tensor
) -> tuple[TensorDictBase, Tensor, Tensor]:
    """Copies the rows at ``index`` [B, L], each slice holding still once it no longer continues."""
    steps = torch.arange(index.shape[1], device=index.device)
    last = continues.cumprod(1).sum(1, keepdim=True)  # [B, 1]
    held = index.gather(1, torch.minimum(steps, last))
    return _rows(contents, held), steps <= last, held


def _rows(contents: TensorDictBase, index: Tensor) -> TensorDictBase:
    """Copies the rows at flat ``index`` [B, L]."""
    return contents.apply(
        lambda leaf: _take(leaf, index, contents.batch_dims),
        batch_size=index.shape,
        is_leaf=is_leaf_nontensor,
    )


def _take(leaf: Tensor, index: Tensor, ndim: int) -> Tensor:
    """Copies the rows at flat ``index`` [B, L] of ``leaf`` [T, (E,) ...] to [B, L, ...]."""
    # Text, and rows whose lanes do not lie in one piece: flattening them would copy the storage.
    if not isinstance(leaf, Tensor) or (ndim > 1 and not leaf.is_contiguous()):
        return leaf[torch.unravel_index(index, leaf.shape[:ndim])]
    # Selecting is several times faster than indexing where a row is wide, and again so where it is
    # a single number and the source has one dimension.
    width = leaf.shape[ndim:]
    source = leaf.view(-1) if width.numel() == 1 else leaf.flatten(0, ndim - 1)
    return source.index_select(0, index.view(-1)).view(index.shape + width)


def _any(rows: Tensor) -> Tensor:
    """Whether anything in a row is True: [B, L, ...] to [B, L]."""
    if rows.shape[2:].numel() == 1:
        return rows.reshape(rows.shape[:2])
    return rows.flatten(2).any(-1)
