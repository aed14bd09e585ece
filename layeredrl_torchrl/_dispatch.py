"""Tensors as keyword arguments in place of a TensorDict."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from tensordict import NestedKey, TensorDict
from torch import Tensor

__all__ = ["dispatched"]

R = TypeVar("R")


def dispatched(forward: Callable[..., R]) -> Callable[..., R]:
    """Accept a module's ``in_keys`` as keyword arguments: ``module(state=..., action=...)``.

    A nested key is joined by underscores: ``("next", "state")`` is ``next_state``. The call then
    returns the entries of ``out_keys``: one tensor, or a tuple of several. (tensordict's own
    ``dispatch`` does not know the batch axes. They are all axes but those of an entry that an
    encoder names, or all but the last axis of a vector of floats.)

    Args:
        forward: Takes a TensorDict with ``in_keys`` as first argument, and returns one with
            ``out_keys``.
    """

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args or "tensordict" in kwargs:
            return forward(self, *args, **kwargs)
        keys = {_name(key): key for key in getattr(self, "in_keys", ())}
        given = {keys[name]: kwargs.pop(name) for name in list(kwargs) if name in keys}
        if not given:
            by_name = f", or tensors by name: {', '.join(keys)}" if keys else ""
            raise TypeError(
                f"{type(self).__name__} takes a TensorDict{by_name}; "
                f"got {', '.join(kwargs) or 'nothing'}"
            )
        tensordict = TensorDict({}, _batch(self, given))
        for key, value in given.items():
            tensordict.set(key, value)
        out: Any = forward(self, tensordict, **kwargs)
        found = tuple(out.get(key) for key in self.out_keys)
        return found[0] if len(found) == 1 else found

    return call


def _batch(module: Any, given: Mapping[NestedKey, Any]) -> torch.Size:
    """Return the batch axes of a module's inputs."""
    shapes = _entries(module)
    for key, value in given.items():
        if key in shapes:
            return torch.Size(value.shape[: value.ndim - len(shapes[key])])
    # Choices may have no axis of their own; states come first among a module's keys.
    ordered = [given[key] for key in module.in_keys if key in given]
    vectors = [x for x in ordered if isinstance(x, Tensor) and x.is_floating_point() and x.ndim]
    return torch.Size((vectors or ordered)[0].shape[:-1])


def _entries(module: Any) -> Mapping[NestedKey, Sequence[int]]:
    """Return the shapes of an observation's entries, from the module's encoder."""
    predictor = getattr(module, "predictor", None)
    for owner in (module, getattr(module, "encoder", None), getattr(predictor, "encoder", None)):
        found = getattr(owner, "entries", None)
        if isinstance(found, Mapping):
            return found
    return {}


def _name(key: NestedKey) -> str:
    return key if isinstance(key, str) else "_".join(map(str, key))
