"""The state of gymnasium's environments and wrappers, as JSON."""

from __future__ import annotations

import copy
import enum
import functools
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.envs.registration import EnvSpec

from layeredrl_torchrl.checkpoints._attributes import attributes, holds_more, set_attribute
from layeredrl_torchrl.checkpoints._simulators import SIMULATORS, array, simulator, unarray

__all__ = ["load", "save"]

# What an attribute may point at, but not be made of: only the name is saved, and compared.
_NAMED = (type, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
# Types of attributes of an environment that do not change while it runs.
_CONSTANT = (
    types.ModuleType,
    functools.partial,
    Path,
    np.dtype,
    EnvSpec,
)
# Modules of locks, and of renderers, which cannot be imported everywhere.
_OPAQUE = ("_thread", "gymnasium.envs.mujoco.mujoco_rendering")
_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")


def save(value: Any, where: str, seen: dict[int, tuple[int, Any]]) -> Any:
    """Return the state of an object and of everything that it holds.

    What is held in several places is saved once. ``None`` stands for what is not saved.

    Args:
        value: Any object.
        where: Its path, for the message.
        seen: What was saved already, with its number, by its ``id``.

    Raises:
        TypeError: An object of unknown state.
    """
    if value is None:
        return {"none": True}
    if isinstance(value, np.generic):
        return {"array": array(np.asarray(value), where), "scalar": True}
    if isinstance(value, enum.Enum):
        member = value.value if isinstance(value, enum.Flag) else value.name
        return {"enum": [type(value).__module__, type(value).__qualname__], "member": member}
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return {"items": _save_items(value, where, seen), "tuple": True}
    if isinstance(value, _NAMED):
        return {"named": value.__qualname__}
    if isinstance(value, _CONSTANT) or type(value).__module__ in _OPAQUE:
        return None
    if isinstance(value, np.ndarray):
        owner = _owner(value)
        if type(owner.base).__name__ == "PyCapsule":  # memory of a simulator, which saves it
            return None
        if owner is not value and owner.flags.c_contiguous and value.size:
            return _save_view(value, owner, where, seen)
    if id(value) in seen:
        return {"again": seen[id(value)][0]}
    seen[id(value)] = len(seen), value
    if isinstance(value, np.ndarray):
        return {"array": array(value, where), "scalar": False}
    if isinstance(value, np.random.Generator):
        return {"generator": _walk(value.bit_generator.state, _encode_number)}
    if isinstance(value, list):
        return {"items": _save_items(value, where, seen), "tuple": False}
    if isinstance(value, dict):
        items = [
            [_save_key(k, where, seen), save(item, f"{where}[{k!r}]", seen)]
            for k, item in value.items()
        ]
        return {"dict": items}
    if (kind := simulator(value)) is not None:
        return {kind: SIMULATORS[kind][0](value)}
    if holds_more(value):
        raise TypeError(
            f"{where} cannot be saved: it is a {type(value).__module__}.{type(value).__name__}, of "
            "whose state nothing is known; the task cannot be resumed. Numbers, numpy's arrays and "
            "generators, lists, dictionaries and plain objects of them can be saved"
        )
    held = attributes(value)
    state = {name: save(item, f"{where}.{name}", seen) for name, item in held.items()}
    return {"object": type(value).__qualname__, "state": state}


class _Loaded:
    """What was loaded already, in the order of the numbers of :func:`save`."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._ids: set[int] = set()

    def __contains__(self, value: object) -> bool:
        return id(value) in self._ids

    def add(self, value: Any) -> Any:
        """Number a value, and return it."""
        self.values.append(value)
        self._ids.add(id(value))
        return value


def load(value: Any, state: Any, where: str, loaded: _Loaded | None = None) -> Any:
    """Bring ``value`` into ``state``: return it after changes in place, or a new value.

    Args:
        value: What is there.
        state: The result of :func:`save`.
        where: Its path, for the message.
        loaded: What was loaded before it.

    Raises:
        ValueError: The state belongs to another kind of object, or to objects that are held in
            other places.
    """
    loaded = _Loaded() if loaded is None else loaded
    if not isinstance(state, dict):
        return value if state is None else state
    if "none" in state:
        return None
    if "named" in state:
        if isinstance(value, _NAMED) and value.__qualname__ != state["named"]:
            raise ValueError(
                f"{where} is {value.__qualname__}, saved was {state['named']}, which cannot be put "
                "there; let the environment hold a name that it looks it up by"
            )
        return value
    if "enum" in state:
        return _load_enum(value, state, where)
    if "again" in state:
        return loaded.values[state["again"]]
    if "view" in state:
        owner = load(None, state["view"], where, loaded)
        how: dict[str, Any] = {name: state[name] for name in ("shape", "offset", "strides")}
        return np.ndarray(dtype=np.dtype(state["dtype"]), buffer=owner, **how)
    if "array" in state:
        found = unarray(state["array"])
        return found[()] if state["scalar"] else loaded.add(found)
    if "generator" in state:
        saved = _walk(state["generator"], _decode_number)
        if saved["bit_generator"] not in _GENERATORS:
            raise ValueError(f"{where} was drawn by {saved['bit_generator']!r}, which is unknown")
        bits = getattr(np.random, saved["bit_generator"])()
        bits.state = saved
        return loaded.add(np.random.Generator(bits))
    if "items" in state:
        return _load_items(value, state, where, loaded)
    if "dict" in state:
        old = value if isinstance(value, dict) else {}
        new = loaded.add(_empty(old, dict))
        for saved_key, saved in state["dict"]:
            key = _load_key(old, saved_key, where, loaded)
            new[key] = load(old.get(key), saved, f"{where}[{key!r}]", loaded)
        return new
    return _load_object(value, state, where, loaded)


def _load_object(value: Any, state: dict[str, Any], where: str, loaded: _Loaded) -> Any:
    """Bring an object into a state, in place."""
    kind = next((kind for kind in SIMULATORS if kind in state), None)
    is_a, was_a = simulator(value) or type(value).__qualname__, kind or state["object"]
    if is_a != was_a:
        raise ValueError(f"{where} is a {is_a}, saved was a {was_a}")
    if value in loaded:
        raise ValueError(
            f"{where} is an object that was loaded for another place, too, and was one of its own "
            "when it was saved; begin with an environment that shares its objects as that one did"
        )
    loaded.add(value)
    if kind is not None:
        SIMULATORS[kind][1](value, state[kind])
        return value
    held = attributes(value)
    for name, saved in state["state"].items():
        had = held.get(name)
        new = load(had, saved, f"{where}.{name}", loaded)
        if new is not had or saved == {"none": True}:
            set_attribute(value, name, new)
    return value


def _save_items(
    items: list[Any] | tuple[Any, ...], where: str, seen: dict[int, tuple[int, Any]]
) -> list[Any]:
    return [save(item, f"{where}[{i}]", seen) for i, item in enumerate(items)]


def _save_key(key: Any, where: str, seen: dict[int, tuple[int, Any]]) -> Any:
    state = save(key, where, seen)
    if state is None or (isinstance(state, dict) and state.keys() & {"object", "again"}):
        raise TypeError(
            f"{where} cannot be saved: it is a dictionary with the key {key!r}; the task cannot be "
            "resumed. Keys can be numbers, texts, members of enumerations, and tuples of them"
        )
    return state


def _load_key(old: dict[Any, Any], state: Any, where: str, loaded: _Loaded) -> Any:
    if not (isinstance(state, dict) and "named" in state):
        return load(None, state, where, loaded)
    for key in old:
        if isinstance(key, _NAMED) and key.__qualname__ == state["named"]:
            return key
    raise ValueError(f"{where} has no key {state['named']}, and had it when it was saved")


def _load_items(value: Any, state: dict[str, Any], where: str, loaded: _Loaded) -> Any:
    """Return a list or a tuple, of the class of ``value`` if that is one."""
    held = list(value) if isinstance(value, list | tuple) else []
    held += [None] * (len(state["items"]) - len(held))
    new = [] if state["tuple"] else loaded.add(_empty(value, list))
    new.extend(load(held[i], s, f"{where}[{i}]", loaded) for i, s in enumerate(state["items"]))
    if not state["tuple"]:
        return new
    make = getattr(value, "_make", tuple) if isinstance(value, tuple) else tuple
    return make(new)  # a named tuple, too


def _empty(value: Any, kind: type) -> Any:
    """Return an empty ``kind``, of the class of ``value`` if that is one."""
    if not isinstance(value, kind) or type(value) is kind:
        return kind()
    new: Any = copy.copy(value)  # with the default of a defaultdict
    new.clear()
    return new


def _load_enum(value: Any, state: dict[str, Any], where: str) -> enum.Enum:
    module, name = state["enum"]
    kind: Any = type(value)
    if kind.__qualname__ != name:
        # Only what was imported already: nothing is run to read a state.
        kind = functools.reduce(
            lambda at, part: getattr(at, part, None), name.split("."), sys.modules.get(module)
        )
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        raise ValueError(f"{where} is a {type(value).__qualname__}, saved was a {module}.{name}")
    return kind(state["member"]) if issubclass(kind, enum.Flag) else kind[state["member"]]


def _walk(value: Any, leaf: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict) and "array" not in value:
        return {key: _walk(item, leaf) for key, item in value.items()}
    return leaf(value)


def _encode_number(value: Any) -> Any:
    return {"array": array(value, "generator")} if isinstance(value, np.ndarray) else value


def _decode_number(value: Any) -> Any:
    return unarray(value["array"]) if isinstance(value, dict) else value


def _owner(value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the array that the memory of ``value`` belongs to."""
    while isinstance(value.base, np.ndarray):
        value = value.base
    return value


def _save_view(
    value: np.ndarray[Any, Any],
    owner: np.ndarray[Any, Any],
    where: str,
    seen: dict[int, tuple[int, Any]],
) -> dict[str, Any]:
    """Return how a view reads the memory of another array, which it shares when it is loaded."""
    return {
        "view": save(owner, where, seen),
        "dtype": value.dtype.str,
        "shape": list(value.shape),
        "strides": list(value.strides),
        "offset": value.ctypes.data - owner.ctypes.data,
    }
