"""The tasks of the benchmark."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec

from layeredrl_torchrl._checks import check_instance
from layeredrl_torchrl.envs.known import (
    ForwardReward,
    InRange,
    double_pendulum_reward,
    double_pendulum_termination,
    inverted_pendulum_reward,
    never,
    pusher_reward,
    reacher_reward,
    swing_up_reward,
    tip_reward,
)
from layeredrl_torchrl.envs.mazes import LARGE, MEDIUM, OPEN, U, point_maze
from layeredrl_torchrl.envs.task import Task

__all__ = ["TASKS", "get_task"]


def _mujoco(spec: str | EnvSpec, obs: int, act: int, **known: Any) -> Task:
    """Make a gymnasium task; by default the whole observation is the state."""
    parts = {"state_dims": tuple(range(obs)), "context_dims": (), "horizon": 1000} | known
    make = partial(gym.make, spec, disable_env_checker=True)
    name = spec if isinstance(spec, str) else spec.id
    return Task(name=name, make_gym=make, observation_dim=obs, action_dim=act, **parts)


def _with_x(name: str, obs: int, act: int, **known: Any) -> Task:
    """Make a walker task that also observes x (first), so that its reward is known."""
    task = _mujoco(name, obs, act, budget=20_000, **known)
    make = partial(task.make_gym, exclude_current_positions_from_observation=False)
    return replace(task, name=f"{name}/x", make_gym=make)


# gym.make also takes a spec in place of a registered name, and imports MuJoCo only then.
_SWING_UP = EnvSpec(
    "CartPoleSwingUp",
    entry_point="layeredrl_torchrl.envs.cartpole:CartPoleSwingUpEnv",
    max_episode_steps=250,
)

_REACHER_TIP = EnvSpec(
    "Reacher-Tip",
    entry_point="layeredrl_torchrl.envs.reacher:ReacherTipEnv",
    max_episode_steps=200,
)

# Height and pitch of the trunk if x is not observed; if it is, indices are one higher. gymnasium's
# Hopper also requires its other coordinates within 100; speeds are clipped at 10.
_HOPPER = ((0, 0.7, float("inf")), (1, -0.2, 0.2), *((d, -100.0, 100.0) for d in range(2, 11)))
_WALKER = ((0, 0.8, 2.0), (1, -1.0, 1.0))


def _one_further(ranges: tuple[tuple[int, float, float], ...]) -> InRange:
    return InRange(tuple((dim + 1, low, high) for dim, low, high in ranges))


_ALL = (
    _mujoco(
        "InvertedPendulum-v5",
        4,
        1,
        budget=2_000,
        solved_at=1000.0,
        reward=inverted_pendulum_reward,
        termination=InRange(((1, -0.2, 0.2),), closed=True),
        observation_names=(
            "cart [m]",
            "pole angle [rad]",
            "cart speed [m/s]",
            "pole speed [rad/s]",
        ),
    ),
    _mujoco(
        "InvertedDoublePendulum-v5",
        9,
        1,
        # The last one, the force of the rail's end, follows from the others and jumps.
        state_dims=tuple(range(8)),
        budget=5_000,
        solved_at=9100.0,
        reward=double_pendulum_reward,
        termination=double_pendulum_termination,
    ),
    _mujoco(
        _SWING_UP,
        5,
        1,
        horizon=250,
        budget=5_000,
        # Sampling-based planning on the true dynamics, 0.8 s ahead, gets 226.
        solved_at=180.0,
        reward=swing_up_reward,
        reward_needs_next_state=False,
        termination=never,
        observation_names=(
            "cart [m]",
            "sin(pole angle)",
            "cos(pole angle)",
            "cart speed [m/s]",
            "pole speed [rad/s]",
        ),
    ),
    _mujoco(
        "Reacher-v5",
        10,
        2,
        # The target's position is drawn at the start of an episode.
        state_dims=(0, 1, 2, 3, 6, 7, 8, 9),
        context_dims=(4, 5),
        horizon=50,
        budget=5_000,
        solved_at=-5.0,
        reward=reacher_reward,
        termination=never,
        observation_names=(
            *("cos(shoulder)", "cos(elbow)", "sin(shoulder)", "sin(elbow)", "target x", "target y"),
            *(
                "shoulder speed [rad/s]",
                "elbow speed [rad/s]",
                "to target, x [m]",
                "to target, y [m]",
            ),
        ),
    ),
    _mujoco(
        _REACHER_TIP,
        10,
        2,
        state_dims=tuple(range(8)),
        context_dims=(8, 9),
        horizon=200,
        budget=20_000,
        reward=tip_reward,
        termination=never,
        reports_success=True,
        observation_names=(
            *("tip x [m]", "tip y [m]", "cos(shoulder)", "cos(elbow)", "sin(shoulder)"),
            *("sin(elbow)", "shoulder speed [rad/s]", "elbow speed [rad/s]"),
            *("target x [m]", "target y [m]"),
        ),
    ),
    _mujoco(
        "Pusher-v5",
        23,
        7,
        # The goal's position.
        state_dims=tuple(range(20)),
        context_dims=(20, 21, 22),
        horizon=100,
        budget=20_000,
        reward=pusher_reward,
        termination=never,
    ),
    # The reward depends on the speed along x, which is not observed here: it has to be learned.
    _mujoco("HalfCheetah-v5", 17, 6, budget=20_000, termination=never),
    _mujoco("Hopper-v5", 11, 3, budget=20_000, termination=InRange(_HOPPER)),
    _mujoco("Walker2d-v5", 17, 6, budget=20_000, termination=InRange(_WALKER)),
    _mujoco("Ant-v5", 105, 8, budget=20_000, termination=InRange(((0, 0.2, 1.0),), closed=True)),
    _mujoco("Swimmer-v5", 8, 2, budget=20_000, termination=never),
    # (MuJoCo's Ant measures its speed at a body whose position it does not observe exactly.)
    _with_x("HalfCheetah-v5", 18, 6, reward=ForwardReward(0.05, 0.1), termination=never),
    _with_x(
        "Hopper-v5",
        12,
        3,
        reward=ForwardReward(0.008, 1e-3, _one_further(_HOPPER)),
        termination=_one_further(_HOPPER),
    ),
    _with_x(
        "Walker2d-v5",
        18,
        6,
        reward=ForwardReward(0.008, 1e-3, _one_further(_WALKER)),
        termination=_one_further(_WALKER),
    ),
    _with_x("Swimmer-v5", 10, 2, reward=ForwardReward(0.04, 1e-4), termination=never),
    *(
        point_maze(f"PointMaze-{name}{kind}", rows, sparse=bool(kind), horizon=horizon)
        for name, rows, horizon in (
            ("Open", OPEN, 300),
            ("U", U, 300),
            ("Medium", MEDIUM, 600),
            ("Large", LARGE, 800),
        )
        for kind in ("", "-Sparse")
    ),
)

TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _ALL})
"""Every task by its name."""


def get_task(name: str) -> Task:
    """Return the task called ``name``; ``KeyError`` with similar names if there is none.

    >>> get_task("InvertedPendulum-v5").solved_at
    1000.0
    """
    check_instance("name", name, str, hint="the names are in TASKS")
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=3) or list(TASKS)
    raise KeyError(f"no task is called {name!r}; is it one of {near}?")
