"""What of a collector's data a level stores, and where."""

from __future__ import annotations

from collections.abc import Iterable

from tensordict import NestedKey, TensorDictBase, unravel_key
from torchrl.data import LazyTensorStorage, ReplayBuffer, TensorDictReplayBuffer

from layeredrl_torchrl._checks import check_finite, check_positive_int

__all__ = ["check_transitions", "make_buffer", "match_layout", "n_env_steps", "uncut"]

_BUFFER_SIZE = 100_000


def make_buffer(buffer: ReplayBuffer | None, size: int | None, n_axes: int) -> ReplayBuffer:
    """``buffer`` itself, or one of ``size`` transitions for data of ``n_axes`` axes."""
    if buffer is None:
        size = check_positive_int("buffer_size", _BUFFER_SIZE if size is None else size)
        return TensorDictReplayBuffer(storage=LazyTensorStorage(size, ndim=n_axes))
    if size is not None:
        raise ValueError(f"buffer_size={size} has no effect beside a buffer; leave it out")
    if not isinstance(buffer, ReplayBuffer):
        raise TypeError(f"buffer must be a torchrl ReplayBuffer, got {type(buffer).__name__}")
    return buffer


def match_layout(buffer: ReplayBuffer, data: TensorDictBase, *, adapt: bool) -> None:
    """Raise ``ValueError`` unless ``buffer`` stores as many axes as ``data`` has.

    Args:
        buffer: Where the data is to be stored.
        data: ``[T]`` or ``[env, T]``.
        adapt: Whether a buffer that is still empty may be laid out for the data.
    """
    storage = buffer.storage
    if adapt and not len(storage):
        storage.ndim = data.ndim
    if data.ndim != storage.ndim:
        raise ValueError(
            f"data has the batch shape {tuple(data.shape)}, but the buffer stores {storage.ndim} "
            "axes; build the level with env=, or pass buffer="
            f"TensorDictReplayBuffer(storage=LazyTensorStorage(n, ndim={data.ndim}))"
        )


def check_transitions(data: object, keys: Iterable[NestedKey]) -> TensorDictBase:
    """``data``, if it has transitions with all of ``keys`` and nothing there is NaN or infinite."""
    if not isinstance(data, TensorDictBase):
        raise TypeError(
            f"data must be a TensorDict of transitions, got {type(data).__name__}; pass what a "
            "collector yields (one with replay_buffer= yields None: leave that out)"
        )
    if not data.ndim or not data.shape.numel():
        raise ValueError(
            f"data has the batch shape {tuple(data.shape)}, expected transitions [T] or [env, T]"
        )
    for key in keys:
        value = data.get(unravel_key(key), None)
        if value is None:
            names = sorted(map(str, data.keys(True, True)))
            raise KeyError(f"data has no {key!r}, which a level learns from; it has {names}")
        if value.is_floating_point():
            check_finite(str(key), value, hint="nothing of the data is stored; repair it first")
    return data


def n_env_steps(data: TensorDictBase) -> int:
    """Environment steps that transitions took: one each, or ``("next", "elapsed_steps")``."""
    elapsed = data.get(("next", "elapsed_steps"), None)
    return data.shape.numel() if elapsed is None else int(elapsed.sum())


def uncut(data: TensorDictBase) -> TensorDictBase:
    """The transitions ``[N]`` that show where their action leads.

    One that a time limit cut short (``("next", "interrupted")``) does not, unless it is seen to
    have terminated. Without the key, all of ``data``.
    """
    cut = data.get(("next", "interrupted"), None)
    if cut is None:
        return data
    return data[(~cut | data.get(("next", "terminated"))).squeeze(-1)]
