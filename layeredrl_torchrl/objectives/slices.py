"""Slices of consecutive transitions, drawn uniformly from a TorchRL replay buffer.

Axis letters: ``B`` slices, ``L`` steps in a slice, ``T`` rows of the storage along time, ``E``
lanes of the storage (environments that stepped side by side; absent if it has one dimension).
"""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDictBase, unravel_key
from torch import Tensor
from torchrl.data import ReplayBuffer

from layeredrl_torchrl._checks import check_positive_int
from layeredrl_torchrl._padding import padding_mask
from layeredrl_torchrl.objectives._stored import (
    StoredRows,
    any_in_row,
    check_single_steps,
    rows_at,
    take,
)

__all__ = ["TransitionSlices"]

# The problem with an entry found in place of a mask, and its remedy for a predictor.
_NO_MASK = (
    ", and which is no mask that was stored (torch.bool, one for each row)",
    " (before learn: predictor_loss.set_keys(valid=...))",
)


class TransitionSlices:
    """Draws slices of consecutive transitions; each stored one is equally likely to start a slice.

    The buffer holds one-step transitions as TorchRL's collectors lay them out, in a tensor or
    memory-mapped storage of one dimension or of several (time first, as
    ``LazyTensorStorage(n, ndim=2)`` stores the collectors' ``[env, time]`` batches). A slice
    continues from a stored row to the next one along time if the row

    - is not done and not terminated,
    - is not the newest row (in a full ring buffer, the oldest follows it),
    - has the same trajectory id as the next row, if the buffer stores ids,
    - is not followed by padding, and
    - leads to the observation from which the next row starts.

    Padding, which TorchRL marks as false in ``("collector", "mask")``, never starts a slice; nor
    does a row that the buffer marks as false under ``valid_key``.

    The last condition needs no bookkeeping, so it also separates episodes that the others miss: in
    batches flattened over environments, in data of collectors whose ids collide, and where a run
    was interrupted and resumed.

    Sampling reads ``B * L`` rows, however many the buffer holds. It changes neither the buffer nor
    its sampler and priorities. The buffer may be empty at first and extended later.

    >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
    >>> buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100))
    >>> obs, done = torch.arange(6.0).unsqueeze(-1), torch.zeros(6, 1, dtype=torch.bool)
    >>> after = {"observation": obs + 1, "done": done, "terminated": done}
    >>> _ = buffer.extend(TensorDict({"observation": obs, "next": after}, [6]))
    >>> slices = TransitionSlices(buffer).sample(32, length=3)
    >>> slices.shape, bool(slices["valid"].all())  # some begin too late for three steps
    (torch.Size([32, 3]), False)

    Args:
        buffer: The buffer to read. Its transforms are applied to the sampled rows as a batch of
            shape ``[B * L]``, like in ``buffer.sample``; the stored rows determine where slices
            end.
        observation_key: Key of the observation. ``("next", observation_key)`` is the next one.
        done_key: Key of the end of an episode, bool ``[T, (E,) 1]``.
        terminated_key: Key of termination, laid out like ``done_key``.
        trajectory_key: Key of the trajectory ids, if the buffer has any; None to ignore them.
        mask_key: Key of the mask that is false for padding, if the buffer has one; a ``"mask"`` at
            the root, as ``split_trajectories`` writes it without a collector, is found as well.
        valid_key: Key under which :meth:`sample` writes which steps belong to the slice. If the
            buffer has an entry with this key, one bool for each row, it is read as a mask like that
            of padding.
        index_key: Key under which :meth:`sample` writes the place of each step in the flattened
            storage, int64 ``[B, L]``; ``None`` to leave it out.

    Raises:
        TypeError: If ``buffer`` is not a replay buffer on a tensor or memory-mapped storage, or if
            its sampler chooses or changes transitions, like those of prioritised and hindsight
            buffers.
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
        self._observation_key = observation_key
        self._next_observation_key: NestedKey = unravel_key(("next", observation_key))
        self._end_keys = (done_key, terminated_key)
        keys = (observation_key, self._next_observation_key, *self._end_keys)
        self._stored = StoredRows(buffer, keys, self._end_keys)
        self._trajectory_key = trajectory_key
        self._mask_key = mask_key
        self._valid_key = valid_key
        self._index_key = index_key

    def __len__(self) -> int:
        """Number of filled places; each may start a slice unless it is padding."""
        return len(self._stored)

    @property
    def n_written(self) -> int:
        """Number of transitions ever written, overwritten ones included.

        Transitions from another process or an earlier run count only while they are stored.
        """
        return self._stored.n_written

    def sample(
        self, batch_size: int, length: int, generator: torch.Generator | None = None
    ) -> TensorDictBase:
        """Draw slices with replacement; every stored transition is equally likely to start one.

        Args:
            batch_size: Number of slices ``B``.
            length: Number of steps ``L`` of a slice.
            generator: Source of randomness, on the storage's device; torch's global one if None.

        Returns:
            TensorDict of shape ``[B, L]`` with all stored keys, after the buffer's transforms, and
            ``valid_key``, bool ``[B, L]``: True up to the last step that continues the episode of
            the slice's first transition. The first step is always valid; steps after the last valid
            one repeat it.

        Raises:
            TypeError: If a count is not an integer or the buffer does not store TensorDicts.
            ValueError: If a count is below 1, the buffer is empty or holds fewer than ``length``
                rows along time, the ends of episodes are not boolean, items are not single
                transitions, a transform changes the batch's shape, or ``valid_key`` is taken.
            KeyError: If a key is missing from the buffer.
        """
        check_positive_int("batch_size", batch_size)
        check_positive_int("length", length)
        # Another thread or process might extend the buffer between the checks and the copy.
        with self._stored.locked():
            rows, valid, index = self._read(batch_size, length, generator)
        return self._finished(rows, valid, index)

    def every(self) -> TensorDictBase:
        """Return each stored transition once, ``[N]``, in the form of :meth:`sample`.

        Raises:
            As :meth:`sample`.
        """
        with self._stored.locked():
            contents, n_rows = self._stored.contents(1)
            n_stored = n_rows * contents.batch_size[1:].numel()
            mask = self._mask(contents)
            if mask is None:
                device = contents.get(self._end_keys[0]).device
                places = torch.arange(n_stored, device=device)
            else:
                places = _transition_places(mask, n_stored)
            index = places.unsqueeze(1)
            rows, valid, index = _copy(contents, index, index[:, 1:].bool())
        return self._finished(rows, valid, index)[:, 0]

    def _mask(self, contents: TensorDictBase) -> Tensor | None:
        """Return the mask that is false for padding and for rows stored as not valid, if any."""
        mask = None if self._mask_key is None else padding_mask(contents, self._mask_key)
        counts = contents.get(self._valid_key, None)
        if not isinstance(counts, Tensor) or not _is_mask(counts, contents.batch_size):
            return mask
        counts = counts.reshape(contents.batch_size)
        return counts if mask is None else mask.reshape(counts.shape) & counts

    def _finished(self, rows: TensorDictBase, valid: Tensor, index: Tensor) -> TensorDictBase:
        """Return stored rows ``[B, L]`` checked, transformed and with what is added to them."""
        check_single_steps(rows)
        shape = rows.batch_size
        if _is_mask(rows.get(self._valid_key, None), shape):  # already used as a mask
            rows = rows.exclude(self._valid_key)
        rows = self._transformed(rows.reshape(-1)).reshape(shape)
        added = {
            "valid_key": (self._valid_key, valid, *_NO_MASK),
            "index_key": (self._index_key, index, "", ""),
        }
        for name, (key, value, wrong, way) in added.items():
            if key is None:
                continue
            if rows.get(key, None) is not None:
                raise ValueError(
                    f"{name}: got {key!r}, which the buffer's rows already have{wrong}; rename "
                    f"that entry, or pass another {name}{way}."
                )
            rows.set(key, value)
        return rows

    def at(self, index: Tensor) -> TensorDictBase:
        """Return the rows ``[N]`` at places ``index [N]`` of the flattened storage.

        Raises:
            As :meth:`sample`.
        """
        with self._stored.locked():
            contents, _ = self._stored.contents(1)
            place = index.to(contents.get(self._end_keys[0]).device)
            rows = rows_at(contents, place.unsqueeze(1))[:, 0]
        return self._transformed(rows)

    def _transformed(self, rows: TensorDictBase) -> TensorDictBase:
        """Apply the buffer's transforms to stored rows ``[N]``."""
        transform = self._stored.buffer.transform
        if not len(transform):
            return rows
        shape = rows.batch_size
        rows = transform(rows)
        if rows.batch_size != shape:
            raise ValueError(
                f"The buffer's transform turned a batch of shape {list(shape)} into one of "
                f"{list(rows.batch_size)}, expected as many rows as went in; use a buffer "
                "without the transform that changes their number."
            )
        return rows

    def _read(
        self, batch_size: int, length: int, generator: torch.Generator | None
    ) -> tuple[TensorDictBase, Tensor, Tensor]:
        """Draw slices; return their stored rows, which of them are valid, and their places.

        All three are of shape [B, L].
        """
        contents, n_rows = self._stored.contents(length)
        ends = [contents.get(key) for key in self._end_keys]
        steps = torch.arange(length, device=ends[0].device)

        # Time is the first dimension, so lanes are interleaved in memory: in the flat storage the
        # next row of a lane is ``n_lanes`` rows later, modulo the ring.
        n_lanes = contents.batch_size[1:].numel()
        n_stored = n_rows * n_lanes
        mask = self._mask(contents)
        start = self._starts(mask, n_stored, batch_size, generator, steps.device)
        index = (start + n_lanes * steps) % n_stored
        if length == 1:  # nothing continues
            return _copy(contents, index, index[:, 1:].bool())

        newest = self._stored.newest(n_rows, capacity=contents.batch_size[0])
        until_newest = (newest - start.div(n_lanes, rounding_mode="floor")) % n_rows  # [B, 1]
        continues = steps[:-1] < until_newest  # [B, L - 1], like all comparisons of neighbours
        for end in ends:
            continues &= ~any_in_row(take(end, index, contents.batch_dims))[:, :-1]
        if mask is not None:
            continues &= any_in_row(take(mask, index, contents.batch_dims))[:, 1:]
        if self._trajectory_key is not None:
            trajectory = contents.get(self._trajectory_key, None)
            if trajectory is not None:
                ids = take(trajectory, index, contents.batch_dims)
                continues &= ~any_in_row(ids[:, 1:] != ids[:, :-1])

        # Observations are wide, so compare them in the copy. In the rare case that nothing else
        # separates two episodes, copy again.
        rows, valid, held = _copy(contents, index, continues)
        reached = rows.get(self._next_observation_key)[:, :-1]
        breaks = any_in_row(reached != rows.get(self._observation_key)[:, 1:])
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
        """Draw flat indices [B, 1] of first transitions, uniform over all but padding."""
        shape = (batch_size, 1)
        if mask is None:
            return torch.randint(n_stored, shape, generator=generator, device=device)
        real = _transition_places(mask, n_stored)
        return real[torch.randint(len(real), shape, generator=generator, device=device)]


def _transition_places(mask: Tensor, n_stored: int) -> Tensor:
    """Return the flat places [N] of transitions, without padding; raise if there are none."""
    real = mask.reshape(-1)[:n_stored].nonzero().squeeze(-1)
    if not len(real):
        raise ValueError(
            f"buffer: got {n_stored} rows of padding and no transition; check its mask, "
            "and what says which rows are valid."
        )
    return real


def _is_mask(stored: object, batch: torch.Size) -> bool:
    """Whether a stored entry is a mask: one bool for each row of ``batch``."""
    if not isinstance(stored, Tensor) or stored.dtype != torch.bool:
        return False
    return stored.shape.numel() == batch.numel()


def _copy(
    contents: TensorDictBase, index: Tensor, continues: Tensor
) -> tuple[TensorDictBase, Tensor, Tensor]:
    """Copy the rows at ``index`` [B, L]; a slice repeats its last step up to length L."""
    steps = torch.arange(index.shape[1], device=index.device)
    last = continues.cumprod(1).sum(1, keepdim=True)  # [B, 1]
    held = index.gather(1, torch.minimum(steps, last))
    return rows_at(contents, held), steps <= last, held
