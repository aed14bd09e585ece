"""Undo a partly loaded checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torchrl.data import ReplayBuffer, TensorStorage

from layeredrl_torchrl._state import Snapshot, empty_storage

__all__ = ["undone_in_part"]


@contextmanager
def undone_in_part(components: Iterable[Any]) -> Iterator[None]:
    """Restore all components if the block raises anything.

    This copies the filled rows of buffers.
    """
    put_back = [_remember(component) for component in components]
    try:
        yield
    except BaseException:
        for restore in put_back:
            restore()
        raise


def _remember(component: Any) -> Callable[[], object]:
    """Return a function that restores the current state of a component."""
    if isinstance(component, ReplayBuffer):
        return _remember_buffer(component)
    if isinstance(component, nn.Module):
        return Snapshot(component).restore
    if isinstance(component, dict | list):
        return _remember_value(component)
    if hasattr(component, "state_dict") and hasattr(component, "load_state_dict"):
        state = copy.deepcopy(component.state_dict())
        return lambda: component.load_state_dict(state)
    return lambda: None


def _remember_value(value: Any) -> Callable[[], object]:
    held = copy.deepcopy(value)

    def restore() -> None:
        value.clear()
        (value.update if isinstance(value, dict) else value.extend)(held)

    return restore


def _remember_buffer(buffer: Any) -> Callable[[], object]:
    storage = buffer.storage
    if not isinstance(storage, TensorStorage):
        return lambda: None  # loading refuses it
    parts = [part for part in (buffer.writer, buffer.sampler, buffer.transform) if part is not None]
    put_back = [_remember_part(part) for part in parts]
    made, length, last = storage.initialized, storage._len, storage._last_cursor
    n_rows = storage._len_along_dim0 if made else 0
    rows = storage._storage[:n_rows].clone() if made else None

    def restore() -> None:
        for restore_part in put_back:
            restore_part()
        if rows is not None:
            storage._storage[:n_rows] = rows
        elif storage.initialized:
            empty_storage(storage)
        storage._len, storage._last_cursor = length, last

    return restore


def _remember_part(part: Any) -> Callable[[], object]:
    """Return a function that restores a writer, a sampler or a transform."""
    try:
        state = copy.deepcopy(part.state_dict())
    except NotImplementedError:  # TensorDictMaxValueWriter, saved by dumps()
        count = getattr(part, "_write_count", None)
        held = {k: v.copy() if isinstance(v, list) else v for k, v in vars(part).items()}

        def restore() -> None:
            vars(part).update(held)
            if count is not None:
                part._write_count = count

        return restore
    return lambda: part.load_state_dict(state)
