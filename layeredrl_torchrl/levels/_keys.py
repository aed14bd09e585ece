"""Lists of keys that follow the keys of a level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensordict import NestedKey

__all__ = ["KeysOf"]


class KeysOf:
    """Works a list of keys out each time it is asked for, since the keys of a level can be set.

    For ``_in_keys`` and for ``_out_keys`` and ``_out_keys_apparent``, which are what TensorDict's
    modules read ``in_keys`` and ``out_keys`` from, so that these can be set and selected from, too.

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
        """Return the keys of ``level``; itself if asked of the class."""
        return self if level is None else self.find(level)
