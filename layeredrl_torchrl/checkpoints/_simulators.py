"""Convert arrays and MuJoCo's models and data to JSON and back."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["SIMULATORS", "array", "simulator", "unarray"]

# Fields of a MjModel that may be large, and that only rendering and meshes need.
_DRAWN = ("tex_", "mesh_", "skin_", "hfield_", "flex_", "bvh_", "names")


def array(value: np.ndarray[Any, Any], where: str) -> dict[str, Any]:
    """Convert an array to JSON; ``TypeError`` if it holds objects."""
    if value.dtype.hasobject:
        raise TypeError(f"{where} cannot be saved: it is an array of objects")
    data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
    return {"dtype": value.dtype.str, "shape": list(value.shape), "data": data}


def unarray(state: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Convert the result of :func:`array` back."""
    data = np.frombuffer(base64.b64decode(state["data"]), dtype=np.dtype(state["dtype"]))
    return data.reshape(state["shape"]).copy()


def simulator(value: Any) -> str | None:
    """Return the key of a MuJoCo object in :data:`SIMULATORS`; ``None`` for other objects."""
    name = f"{type(value).__module__}.{type(value).__name__}"
    return name if name in SIMULATORS else None


def _numbers(value: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays of a MjModel or MjData that have a constant size."""
    found = {}
    for name in dir(value):
        if name.startswith(("_", "efc_", *_DRAWN)):
            continue
        try:
            item = getattr(value, name)
        except (AttributeError, RuntimeError, TypeError, ValueError):
            continue
        if isinstance(item, np.ndarray) and item.size and item.dtype.kind in "fiub":
            found[name] = item
    return found


def _save_arrays(value: Any) -> dict[str, Any]:
    return {name: array(item, name) for name, item in _numbers(value).items()}


def _load_arrays(value: Any, state: dict[str, Any]) -> None:
    for name, item in _numbers(value).items():
        if name in state and item.flags.writeable:
            saved = unarray(state[name])
            # The sizes of contacts and constraints vary.
            if saved.shape == item.shape:
                item[...] = saved


def _save_data(data: Any) -> dict[str, Any]:
    import mujoco  # type: ignore[import-untyped]

    which = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(data.model, which))
    mujoco.mj_getState(data.model, data, state, which)
    return {"state": array(state, "data"), "computed": _save_arrays(data)}


def _load_data(data: Any, state: dict[str, Any]) -> None:
    import mujoco

    mujoco.mj_setState(
        data.model, data, unarray(state["state"]), mujoco.mjtState.mjSTATE_INTEGRATION
    )
    # This fills the arena of contacts and constraints. After a step, all other computed fields
    # belong to the state before the step, and some rewards read them, so restore them.
    mujoco.mj_forward(data.model, data)
    _load_arrays(data, state["computed"])
    mujoco.mj_setState(
        data.model, data, unarray(state["state"]), mujoco.mjtState.mjSTATE_INTEGRATION
    )


SIMULATORS: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], None]]] = {
    "mujoco._structs.MjModel": (_save_arrays, _load_arrays),
    "mujoco._structs.MjData": (_save_data, _load_data),
}
