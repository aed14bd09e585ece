"""Mazes as data, and point mazes as tasks (gymnasium-robotics, an optional dependency)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec

from layeredrl_torchrl._checks import check_flag
from layeredrl_torchrl.envs.known import goal_distance_reward, goal_reached_reward, never
from layeredrl_torchrl.envs.task import Task

__all__ = ["LARGE", "MEDIUM", "OPEN", "U", "parse_maze", "point_maze"]

# Rows from the top; a cell is 1 m wide. "#" is a wall, "." is free. A maze may also mark starts
# ("r"), goals ("g"), or both ("c"); without marks every free cell can be either. These four mazes
# are from D4RL (arXiv 2004.07219).
OPEN = (
    "#######",
    "#.....#",
    "#.....#",
    "#.....#",
    "#######",
)
U = (
    "#####",
    "#...#",
    "###.#",
    "#...#",
    "#####",
)
MEDIUM = (
    "########",
    "#..##..#",
    "#..#...#",
    "##...###",
    "#..#...#",
    "#.#..#.#",
    "#...#..#",
    "########",
)
LARGE = (
    "############",
    "#....#.....#",
    "#.##.#.#.#.#",
    "#......#...#",
    "#.####.###.#",
    "#..#.#.....#",
    "##.#.#.#.###",
    "#..#...#...#",
    "############",
)

_CELLS: dict[str, int | str] = {"#": 1, ".": 0, "r": "r", "g": "g", "c": "c"}


def parse_maze(rows: Sequence[str]) -> list[list[int | str]]:
    """Check rows of characters, and turn them into gymnasium-robotics' ``maze_map``.

    Raises:
        ValueError: No rows or rows of unequal length, other characters, a gap in the outer wall, or
            a goal without a start in another cell.
    """
    rows = list(rows)
    widths = sorted({len(row) for row in rows})
    if len(widths) != 1 or widths[0] < 3 or len(rows) < 3:
        raise ValueError(
            f"a maze needs at least 3 rows of one length of at least 3, got {len(rows)} rows of "
            f"lengths {widths}"
        )
    unknown = sorted(set("".join(rows)) - set(_CELLS))
    if unknown:
        raise ValueError(f"a maze is made of {' '.join(_CELLS)}, got {unknown}")
    border = rows[0] + rows[-1] + "".join(row[0] + row[-1] for row in rows)
    if set(border) != {"#"}:
        raise ValueError(f"the outer wall has a gap; surround the maze with '#', got {rows}")
    places = {
        kind: {(i, j) for i, row in enumerate(rows) for j, cell in enumerate(row) if cell == kind}
        for kind in ".rgc"
    }
    free, starts, goals, both = (places[kind] for kind in ".rgc")
    # As in gymnasium-robotics: without marks, starts or goals may be in any free cell.
    starts, goals = (starts | both or free), (goals | both or free)
    # It draws starts until one differs from the goal: for ever, if there is no other.
    if not starts or not goals or (len(starts) == 1 and starts <= goals):
        raise ValueError(
            f"every goal needs a start in another cell, got {len(starts)} starts and "
            f"{len(goals)} goals in {rows}"
        )
    return [[_CELLS[cell] for cell in row] for row in rows]


def _make(rows: tuple[str, ...], sparse: bool, horizon: int, **kwargs: Any) -> gym.Env[Any, Any]:
    if importlib.util.find_spec("gymnasium_robotics") is None:
        raise ImportError(
            "point mazes come from gymnasium-robotics, which is not installed; "
            'in the clone, python -m pip install -e ".[robotics]"',
            name="gymnasium_robotics",
        )
    # With our own spec, nothing has to be registered with gymnasium.
    spec = EnvSpec(
        "PointMaze-v3",
        entry_point="gymnasium_robotics.envs.maze.point_maze:PointMazeEnv",
        max_episode_steps=horizon,
        kwargs={
            "maze_map": parse_maze(rows),
            "reward_type": "sparse" if sparse else "dense",
            "continuing_task": True,
            "reset_target": False,
        },
    )
    env = gym.make(spec, disable_env_checker=True, **kwargs)
    # The file is read only once, and would stay in the folder for temporary files.
    maze: Any = env.unwrapped
    Path(maze.tmp_xml_file_path).unlink(missing_ok=True)
    return env


def point_maze(
    name: str,
    rows: Sequence[str],
    *,
    sparse: bool = False,
    horizon: int = 300,
    budget: int = 20_000,
) -> Task:
    """Make the task of pushing a point mass to a goal that changes between episodes.

    ``"observation" [8]`` is position and velocity (m, m/s), achieved goal and desired goal, joined.
    The achieved goal repeats the position, so the state is the first four dimensions; the context
    is the desired goal. The action is a force along x and y, each in ``[-1, 1]``, held for 0.01 s.
    Episodes run to their time limit; ``"success"`` is true within 0.45 m of the goal.

    >>> task = point_maze("Corridor", ["#######", "#r...g#", "#######"], sparse=True)
    >>> task.context_dims  # the goal
    (6, 7)

    Args:
        name: Name of the task.
        rows: The maze, for instance :data:`OPEN`; for the characters see the source of this module.
        sparse: Whether the reward is 1 at the goal and 0 elsewhere, instead of ``exp(-distance)``.
        horizon: Steps of an episode.
        budget: See :class:`Task`.

    Raises:
        TypeError, ValueError: See :func:`parse_maze` and :class:`Task`; ``sparse`` that is not a
            bool.
        ImportError: When an environment is made and gymnasium-robotics is not installed.
    """
    parse_maze(rows)
    check_flag("sparse", sparse)
    return Task(
        name=name,
        make_gym=partial(_make, tuple(rows), sparse, horizon),
        observation_dim=8,
        state_dims=(0, 1, 2, 3),
        context_dims=(6, 7),
        action_dim=2,
        horizon=horizon,
        budget=budget,
        reward=goal_reached_reward if sparse else goal_distance_reward,
        termination=never,
        joined=("observation", "achieved_goal", "desired_goal"),
        reports_success=True,
        observation_names=(
            *("x [m]", "y [m]", "speed in x [m/s]", "speed in y [m/s]"),
            *("achieved x [m]", "achieved y [m]", "goal x [m]", "goal y [m]"),
        ),
    )
