"""Tensors as keyword arguments in place of a TensorDict."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from tensordict import NestedKey, TensorDict

__all__ = ["dispatched"]

R = TypeVar("R")


def dispatched(forward: Callable[..., R]) -> Callable[..., R]:
    """Let a module's ``in_keys`` be given by name: ``module(state=..., action=...)``.

    A nested key is joined by underscores: ``("next", "state")`` is ``next_state``. What is returned
    then are the entries below ``out_keys``, a tensor if there is one and a tuple if there are more.
    (tensordict's own ``dispatch`` does not know which axes are the batch's: all but the last.)

    Args:
        forward: Reads ``in_keys`` of a TensorDict, its first argument, and returns one with
            ``out_keys``.
    """

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args or "tensordict" in kwargs:
            return forward(self, *args, **kwargs)
        keys = {_name(key): key for key in self.in_keys}
        given = {keys[name]: kwargs.pop(name) for name in list(kwargs) if name in keys}
        if not given:
            raise TypeError(
                f"{type(self).__name__} takes a TensorDict, or tensors by name: {', '.join(keys)}; "
                f"got {', '.join(kwargs) or 'nothing'}"
            )
        batch = next(iter(given.values())).shape[:-1]
        tensordict = TensorDict({}, batch)
        for key, value in given.items():
            tensordict.set(key, value)
        out: Any = forward(self, tensordict, **kwargs)
        found = tuple(out.get(key) for key in self.out_keys)
        return found[0] if len(found) == 1 else found

    return call


def _name(key: NestedKey) -> str:
    return key if isinstance(key, str) else "_".join(map(str, key))
