"""The whole state of environments: where a simulation is, and which random numbers come next."""

from __future__ import annotations

import base64
import enum
import json
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer
from gymnasium.envs.registration import EnvSpec
from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, GymWrapper, SerialEnv, TransformedEnv

__all__ = ["CollectorState", "EnvState"]

# What an environment holds that neither changes nor is drawn from while it runs.
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
    MujocoRenderer,
)
_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
# Of a MjModel: what only pictures and meshes need, and may be large.
_DRAWN = ("tex_", "mesh_", "skin_", "hfield_", "flex_", "bvh_", "names")


class EnvState:
    """What an environment needs to go on as if it had never stopped, for checkpoints.

    For TorchRL's ``GymEnv``, ``GymWrapper`` and ``SerialEnv`` of such, below any transforms, and
    so for ``Task.make`` and ``make_batched``: the state of the transforms, all numbers and random
    generators that gymnasium's environments and wrappers hold, and MuJoCo's full state with time,
    warm start and all that was computed from it. An environment of TorchRL's own has to override
    ``state_dict``.

    >>> env, twin = (make_batched("Reacher-v5", 2, seed=seed) for seed in (0, 7))
    >>> data = env.rollout(5)[:, -1]
    >>> EnvState(twin).load_state_dict(EnvState(env).state_dict())
    >>> steps = [e.step(data.clone())["next"] for e in (env, twin)]
    >>> torch.equal(steps[0]["observation"], steps[1]["observation"])
    True

    Args:
        env: The environment.

    Raises:
        TypeError: An environment that cannot be saved, naming the part that stands in the way.
    """

    def __init__(self, env: EnvBase) -> None:
        self.env = env
        for part in _parts(env):
            if not isinstance(part, EnvBase | torch.nn.Module):
                _save(part, type(part).__name__, {})

    def state_dict(self) -> dict[str, Any]:
        """The state of each part, outermost first."""
        states: list[Any] = []
        for part in _parts(self.env):
            if isinstance(part, torch.nn.Module):
                states.append(dict(part.state_dict()))
            else:
                states.append(json.dumps(_save(part, type(part).__name__, {})))
        return {"parts": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Bring the environment into a saved state.

        Raises:
            ValueError: The state is one of other environments.
        """
        parts, saved = list(_parts(self.env)), state_dict["parts"]
        if len(parts) != len(saved):
            raise ValueError(f"the state has {len(saved)} parts, the environment {len(parts)}")
        for part, state in zip(parts, saved, strict=True):
            if isinstance(part, torch.nn.Module):
                part.load_state_dict(state)
            else:
                _load(part, json.loads(state), type(part).__name__)


class CollectorState:
    """What a ``Collector`` of this process needs to go on as if it had never stopped.

    Its environments (:class:`EnvState`), the TensorDict it carries from step to step (with the
    memories of policies and transforms), the numbers of its trajectories, and its counters. The
    policy's weights are not in it.

    Args:
        collector: TorchRL's ``Collector``.

    Raises:
        TypeError: Another collector (each of its workers would have to be asked), or an environment
            that cannot be saved.

    >>> env = make_batched("InvertedPendulum-v5", 2, seed=0)
    >>> from torchrl.collectors import Collector
    >>> collector = Collector(env, frames_per_batch=4, total_frames=8)
    >>> batches = iter(collector)
    >>> data = next(batches)
    >>> CollectorState(collector).state_dict()["frames"]
    4
    """

    def __init__(self, collector: Collector) -> None:
        if not isinstance(collector, Collector):
            raise TypeError(
                f"only a Collector of this process can be saved, got {type(collector).__name__}: "
                "a run of workers goes on with new episodes"
            )
        self.collector = collector
        self.env = EnvState(collector.env)

    def state_dict(self) -> dict[str, Any]:
        """The state between two batches."""
        state = self.collector.state_dict()
        return {
            "frames": state["frames"],
            "iter": state["iter"],
            "traj_pool": state.get("traj_pool"),
            "carried": _tensors(self.collector._carrier),
            "env": self.env.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Bring the collector into a saved state, before it is iterated over."""
        collector = self.collector
        self.env.load_state_dict(state_dict["env"])
        # TorchRL restores counters but begins new trajectories; here the old ones go on.
        collector._frames, collector._iter = state_dict["frames"], state_dict["iter"]
        if state_dict["traj_pool"] is not None:
            collector._traj_pool.load_state_dict(state_dict["traj_pool"])
        old = collector._carrier
        collector._carrier = TensorDict(
            state_dict["carried"], batch_size=old.batch_size, device=old.device
        )


def _tensors(tensordict: TensorDictBase) -> dict[str, Any]:
    return {
        key: _tensors(value) if isinstance(value, TensorDictBase) else value.detach().cpu()
        for key, value in tensordict.items()
    }


def _parts(env: EnvBase) -> Iterator[torch.nn.Module | gym.Env[Any, Any]]:
    """Transforms, TorchRL environments that know their state, and gymnasium's environments."""
    if isinstance(env, TransformedEnv):
        yield env.transform
        yield from _parts(env.base_env)
    elif isinstance(env, SerialEnv):
        if env.is_closed:
            env.start()
        for one in env._envs:
            yield from _parts(one)
    elif isinstance(env, GymWrapper):
        yield env._env
    elif type(env).state_dict is not EnvBase.state_dict:
        yield env
    else:
        raise TypeError(
            f"the state of a {type(env).__name__} cannot be saved: it is neither gymnasium's "
            "(GymEnv, GymWrapper, also in a SerialEnv) nor does it override state_dict"
        )


# -- gymnasium's objects as JSON -----------------------------------------------------------------
# An object is walked once: `seen` has the numbers of those that were met.


def _save(value: Any, where: str, seen: dict[int, Any]) -> Any:
    if isinstance(value, bool | int | float | str) and not isinstance(value, enum.Enum):
        return value
    if isinstance(value, np.ndarray | np.generic):
        return {"array": _array(np.asarray(value), where), "scalar": isinstance(value, np.generic)}
    if isinstance(value, np.random.Generator):
        return {"generator": _walk(value.bit_generator.state, _number)}
    if isinstance(value, list | tuple):
        items = [_save(item, f"{where}[{i}]", seen) for i, item in enumerate(value)]
        return {"items": items, "tuple": isinstance(value, tuple)}
    if isinstance(value, dict):
        items = [
            [_save(k, where, seen), _save(item, f"{where}[{k!r}]", seen)]
            for k, item in value.items()
        ]
        return {"dict": items}
    if isinstance(value, _CONSTANT) or _is_lock(value):
        return None
    if id(value) in seen:
        return None
    seen[id(value)] = value
    if (kind := _simulator(value)) is not None:
        return {kind: _SIMULATORS[kind][0](value)}
    if not hasattr(value, "__dict__"):
        raise TypeError(
            f"{where} cannot be saved: it is a {type(value).__module__}.{type(value).__name__}, of "
            "whose state nothing is known; the task cannot be resumed"
        )
    state = {
        name: _save(item, f"{where}.{name}", seen)
        for name, item in vars(value).items()
        if not _is_view(item)
    }
    return {"object": type(value).__qualname__, "state": state}


def _load(value: Any, state: Any, where: str) -> Any:
    """What ``value`` has to be to be in ``state``: itself, changed, or another value."""
    if not isinstance(state, dict):
        # None stands for what is not saved, and for None.
        return value if state is None else state
    if "array" in state:
        array = _unarray(state["array"])
        return array[()] if state["scalar"] else array
    if "generator" in state:
        saved = _walk(state["generator"], _unnumber)
        if saved["bit_generator"] not in _GENERATORS:
            raise ValueError(f"{where} was drawn by {saved['bit_generator']!r}, which is unknown")
        bits = getattr(np.random, saved["bit_generator"])()
        bits.state = saved
        return np.random.Generator(bits)
    if "items" in state:
        old = list(value) if isinstance(value, list | tuple) else []
        old += [None] * (len(state["items"]) - len(old))
        items = [
            _load(v, s, f"{where}[{i}]")
            for i, (v, s) in enumerate(zip(old, state["items"], strict=False))
        ]
        return tuple(items) if state["tuple"] else items
    if "dict" in state:
        old = value if isinstance(value, dict) else {}
        found = {}
        for saved_key, saved in state["dict"]:
            key = _load(None, saved_key, where)
            found[key] = _load(old.get(key), saved, f"{where}[{key!r}]")
        return found
    for kind, (_, load) in _SIMULATORS.items():
        if kind in state:
            if _simulator(value) != kind:
                raise ValueError(f"{where} is a {type(value).__name__}, saved was a {kind}")
            load(value, state[kind])
            return value
    if type(value).__qualname__ != state["object"]:
        raise ValueError(f"{where} is a {type(value).__qualname__}, saved was a {state['object']}")
    for name, saved in state["state"].items():
        had = vars(value).get(name)
        new = _load(had, saved, f"{where}.{name}")
        if new is not had:
            vars(value)[name] = new
    return value


def _array(value: np.ndarray[Any, Any], where: str) -> dict[str, Any]:
    if value.dtype.hasobject:
        raise TypeError(f"{where} cannot be saved: it is an array of objects")
    data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
    return {"dtype": value.dtype.str, "shape": list(value.shape), "data": data}


def _unarray(state: dict[str, Any]) -> np.ndarray[Any, Any]:
    data = np.frombuffer(base64.b64decode(state["data"]), dtype=np.dtype(state["dtype"]))
    return data.reshape(state["shape"]).copy()


def _walk(value: Any, leaf: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict) and "array" not in value:
        return {key: _walk(item, leaf) for key, item in value.items()}
    return leaf(value)


def _number(value: Any) -> Any:
    return {"array": _array(value, "generator")} if isinstance(value, np.ndarray) else value


def _unnumber(value: Any) -> Any:
    return _unarray(value["array"]) if isinstance(value, dict) else value


def _is_view(value: Any) -> bool:
    """Whether an array shows memory of a simulator, which is saved by its owner."""
    base = value.base if isinstance(value, np.ndarray) else None
    return base is not None and not isinstance(base, np.ndarray | bytes | bytearray | memoryview)


def _is_lock(value: Any) -> bool:
    return type(value).__module__ == "_thread"


# -- MuJoCo --------------------------------------------------------------------------------------


def _simulator(value: Any) -> str | None:
    name = f"{type(value).__module__}.{type(value).__name__}"
    return name if name in _SIMULATORS else None


def _numbers(value: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of a MjModel or MjData whose sizes do not change while it runs."""
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
    return {name: _array(item, name) for name, item in _numbers(value).items()}


def _load_arrays(value: Any, state: dict[str, Any]) -> None:
    for name, item in _numbers(value).items():
        if name in state and item.flags.writeable:
            saved = _unarray(state[name])
            # Lists of contacts and constraints are as long as there are some.
            if saved.shape == item.shape:
                item[...] = saved


def _save_data(data: Any) -> dict[str, Any]:
    import mujoco

    which = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(data.model, which))
    mujoco.mj_getState(data.model, data, state, which)
    return {"state": _array(state, "data"), "computed": _save_arrays(data)}


def _load_data(data: Any, state: dict[str, Any]) -> None:
    import mujoco

    mujoco.mj_setState(
        data.model, data, _unarray(state["state"]), mujoco.mjtState.mjSTATE_INTEGRATION
    )
    # Contacts and constraints lie in an arena that this fills. The rest of what is computed from
    # the state belongs, after a step, to the state before it, and some rewards read it.
    mujoco.mj_forward(data.model, data)
    _load_arrays(data, state["computed"])
    mujoco.mj_setState(
        data.model, data, _unarray(state["state"]), mujoco.mjtState.mjSTATE_INTEGRATION
    )


_SIMULATORS: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], None]]] = {
    "mujoco._structs.MjModel": (_save_arrays, _load_arrays),
    "mujoco._structs.MjData": (_save_data, _load_data),
}
