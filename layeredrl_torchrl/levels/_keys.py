"""Lists of keys that depend on the keys of a level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensordict import NestedKey

__all__ = ["KeysOf"]


class KeysOf:
    """Computes a list of keys at each access, since the keys of a level can be set.

    Use it for ``_in_keys``, ``_out_keys`` and ``_out_keys_apparent``, from which tensordict's
    modules read ``in_keys`` and ``out_keys``, so that these can also be set and selected from.

    >>> class Reads(RandomLevel):
    ...     _in_keys = KeysOf(lambda self: [self.observation_key, "more"])
    >>> reads = Reads()
    >>> reads.observation_key = "pixels"
    >>> reads.in_keys
    ['pixels', 'more']

    Args:
        find: Called with the level, returns the keys.
    """

    def __init__(self, find: Callable[[Any], list[NestedKey]]) -> None:
        self.find = find

    def __get__(self, level: Any, kind: type | None = None) -> Any:
        """Return the keys of ``level``; on the class, return this object."""
        return self if level is None else self.find(level)
