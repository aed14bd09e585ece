"""The attributes of any object, and whether there is more to it."""

from __future__ import annotations

import struct
from typing import Any

__all__ = ["attributes", "holds_more", "set_attribute"]


def attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object by their names, also those in ``__slots__``.

    Without the slots that a library has for itself, as ``__pydantic_fields_set__``.
    """
    own = [name for name in _slots(value) if not name.endswith("__")]
    held = {name: getattr(value, name) for name in own if hasattr(value, name)}
    return held | getattr(value, "__dict__", {})


def set_attribute(value: Any, name: str, new: Any) -> None:
    """Set an attribute, of a frozen dataclass, too."""
    if name in _slots(value):
        object.__setattr__(value, name, new)
    else:
        vars(value)[name] = new


def holds_more(value: Any) -> bool:
    """Whether an object is larger than its attributes: it holds more in C, as tensors do."""
    kinds = type(value).__mro__
    if not (hasattr(value, "__dict__") or any("__slots__" in vars(kind) for kind in kinds)):
        return True
    # A dictionary and weak references have a pointer each, and so has each slot.
    most = object.__basicsize__ + (2 + len(_slots(value))) * struct.calcsize("P")
    return type(value).__basicsize__ > most


def _slots(value: Any) -> list[str]:
    found = []
    for kind in type(value).__mro__:
        names = vars(kind).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            private = name.startswith("__") and not name.endswith("__")
            found.append(f"_{kind.__name__.lstrip('_')}{name}" if private else name)
    return [name for name in found if name not in ("__dict__", "__weakref__")]
