"""The complete state of environments: simulation and random generators."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, GymWrapper, ParallelEnv, SerialEnv, TransformedEnv

from layeredrl_torchrl.checkpoints._objects import load, save

__all__ = ["CollectorState", "EnvState"]


class EnvState:
    """Saves and loads the state of an environment, which then continues as if never stopped.

    It supports TorchRL's ``GymEnv``, ``GymWrapper`` and ``SerialEnv`` of these, with any
    transforms, and so ``Task.make`` and ``make_batched``. The state contains that of the
    transforms, all numbers, choices and random generators in gymnasium's environments and wrappers,
    which are shared as they were, and MuJoCo's full state with time, warm start and computed
    fields. Other TorchRL environments have to override ``state_dict``.

    >>> env, twin = (make_batched("Reacher-v5", 2, seed=seed) for seed in (0, 7))
    >>> data = env.rollout(5)[:, -1]
    >>> from layeredrl_torchrl.checkpoints import EnvState
    >>> EnvState(twin).load_state_dict(EnvState(env).state_dict())
    >>> steps = [e.step(data.clone())["next"] for e in (env, twin)]
    >>> torch.equal(steps[0]["observation"], steps[1]["observation"])
    True

    Args:
        env: The environment.

    Raises:
        TypeError: An environment that cannot be saved; the message names the part.
    """

    def __init__(self, env: EnvBase) -> None:
        self.env = env
        for part in _parts(env):
            if not isinstance(part, EnvBase | torch.nn.Module):
                save(part, type(part).__name__, {})

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each part, outermost first."""
        states: list[Any] = []
        for part in _parts(self.env):
            if isinstance(part, torch.nn.Module):
                states.append(dict(part.state_dict()))
            else:
                states.append(json.dumps(save(part, type(part).__name__, {})))
        return {"parts": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved state of the environment.

        Raises:
            ValueError: The state belongs to another environment.
        """
        parts, saved = list(_parts(self.env)), state_dict["parts"]
        if len(parts) != len(saved):
            raise ValueError(f"the state has {len(saved)} parts, the environment {len(parts)}")
        for part, state in zip(parts, saved, strict=True):
            if isinstance(part, torch.nn.Module):
                part.load_state_dict(state)
            else:
                load(part, json.loads(state), type(part).__name__)


class CollectorState:
    """Saves and loads the state of a ``Collector``, which then continues as if never stopped.

    It contains the state of the environments (:class:`EnvState`), the TensorDict that is passed
    from step to step (with the memories of policies and transforms), the trajectory ids and the
    counters, but not the policy's weights.

    Args:
        collector: TorchRL's ``Collector`` in this process.

    Raises:
        TypeError: Another kind of collector, whose state is spread over workers, or an environment
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
                "a run with workers continues with new episodes"
            )
        self.collector = collector
        self.env = EnvState(collector.env)

    def state_dict(self) -> dict[str, Any]:
        """Return the state between two batches."""
        state = self.collector.state_dict()
        return {
            "frames": state["frames"],
            "iter": state["iter"],
            "traj_pool": state.get("traj_pool"),
            "carried": _tensors(self.collector._carrier),
            "env": self.env.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved state of the collector; call it before iterating."""
        collector = self.collector
        self.env.load_state_dict(state_dict["env"])
        # TorchRL restores the counters but starts new trajectories; here the old ones continue.
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
    """Yield transforms, environments that define ``state_dict``, and gymnasium's environments."""
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
    elif isinstance(env, ParallelEnv):
        # Its state_dict is that of the workers' transforms, without their environments.
        raise TypeError(
            f"the state of a {type(env).__name__} cannot be saved: its workers keep it; use "
            "make_batched, or a SerialEnv"
        )
    elif type(env).state_dict is not EnvBase.state_dict:
        yield env
    else:
        raise TypeError(
            f"the state of a {type(env).__name__} cannot be saved: it is neither gymnasium's "
            "(GymEnv, GymWrapper, also in a SerialEnv) nor does it override state_dict"
        )
