"""The state of gymnasium's environments and wrappers, as JSON."""

from __future__ import annotations

import enum
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.envs.registration import EnvSpec

from layeredrl_torchrl.checkpoints._simulators import SIMULATORS, array, simulator, unarray

__all__ = ["load", "save"]

# Types of attributes of an environment that do not change while it runs.
_CONSTANT = (
    type(None),
    type,
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
    types.ModuleType,
    enum.Enum,
    Path,
    np.dtype,
    EnvSpec,
)
# Modules of locks, and of renderers, which cannot be imported everywhere.
_OPAQUE = ("_thread", "gymnasium.envs.mujoco.mujoco_rendering")
_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")


def save(value: Any, where: str, seen: dict[int, Any]) -> Any:
    """Return the state of an object and of everything that it holds.

    Args:
        value: Any object.
        where: Its path, for the message.
        seen: Objects that were saved already, by their ``id``.

    Raises:
        TypeError: An object of unknown state.
    """
    if isinstance(value, bool | int | float | str) and not isinstance(value, enum.Enum):
        return value
    if isinstance(value, np.ndarray | np.generic):
        return {"array": array(np.asarray(value), where), "scalar": isinstance(value, np.generic)}
    if isinstance(value, np.random.Generator):
        return {"generator": _walk(value.bit_generator.state, _number)}
    if isinstance(value, list | tuple):
        items = [save(item, f"{where}[{i}]", seen) for i, item in enumerate(value)]
        return {"items": items, "tuple": isinstance(value, tuple)}
    if isinstance(value, dict):
        items = [
            [save(k, where, seen), save(item, f"{where}[{k!r}]", seen)] for k, item in value.items()
        ]
        return {"dict": items}
    if isinstance(value, _CONSTANT) or type(value).__module__ in _OPAQUE:
        return None
    if id(value) in seen:
        return None
    seen[id(value)] = value
    if (kind := simulator(value)) is not None:
        return {kind: SIMULATORS[kind][0](value)}
    if not hasattr(value, "__dict__"):
        raise TypeError(
            f"{where} cannot be saved: it is a {type(value).__module__}.{type(value).__name__}, of "
            "whose state nothing is known; the task cannot be resumed"
        )
    state = {
        name: save(item, f"{where}.{name}", seen)
        for name, item in vars(value).items()
        if not _is_view(item)
    }
    return {"object": type(value).__qualname__, "state": state}


def load(value: Any, state: Any, where: str) -> Any:
    """Bring ``value`` into ``state``: return it after changes in place, or a new value.

    Raises:
        ValueError: The state belongs to another kind of object.
    """
    if not isinstance(state, dict):
        # None stands for None, and for objects that are not saved.
        return value if state is None else state
    if "array" in state:
        array = unarray(state["array"])
        return array[()] if state["scalar"] else array
    if "generator" in state:
        saved = _walk(state["generator"], _unnumber)
        if saved["bit_generator"] not in _GENERATORS:
            raise ValueError(f"{where} was drawn by {saved['bit_generator']!r}, which is unknown")
        bits = getattr(np.random, saved["bit_generator"])()
        bits.state = saved
        return np.random.Generator(bits)
    if "items" in state:
        held = list(value) if isinstance(value, list | tuple) else []
        held += [None] * (len(state["items"]) - len(held))
        items = [load(held[i], s, f"{where}[{i}]") for i, s in enumerate(state["items"])]
        return tuple(items) if state["tuple"] else items
    if "dict" in state:
        old = value if isinstance(value, dict) else {}
        found = {}
        for saved_key, saved in state["dict"]:
            key = load(None, saved_key, where)
            found[key] = load(old.get(key), saved, f"{where}[{key!r}]")
        return found
    for kind, (_, restore) in SIMULATORS.items():
        if kind in state:
            if simulator(value) != kind:
                raise ValueError(f"{where} is a {type(value).__name__}, saved was a {kind}")
            restore(value, state[kind])
            return value
    if type(value).__qualname__ != state["object"]:
        raise ValueError(f"{where} is a {type(value).__qualname__}, saved was a {state['object']}")
    for name, saved in state["state"].items():
        had = vars(value).get(name)
        new = load(had, saved, f"{where}.{name}")
        if new is not had:
            vars(value)[name] = new
    return value


def _walk(value: Any, leaf: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict) and "array" not in value:
        return {key: _walk(item, leaf) for key, item in value.items()}
    return leaf(value)


def _number(value: Any) -> Any:
    return {"array": array(value, "generator")} if isinstance(value, np.ndarray) else value


def _unnumber(value: Any) -> Any:
    return unarray(value["array"]) if isinstance(value, dict) else value


def _is_view(value: Any) -> bool:
    """Return whether an array is a view of a simulator's memory, which its owner saves."""
    base = value.base if isinstance(value, np.ndarray) else None
    return base is not None and not isinstance(base, np.ndarray | bytes | bytearray | memoryview)
