"""Mazes as data, point mazes as tasks, and what happens without gymnasium-robotics."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from layeredrl_torchrl.envs import TASKS, make_batched, point_maze
from layeredrl_torchrl.envs.mazes import LARGE, MEDIUM, OPEN, U, parse_maze

needs_robotics = pytest.mark.skipif(
    importlib.util.find_spec("gymnasium_robotics") is None, reason="needs gymnasium-robotics"
)


@needs_robotics
@pytest.mark.parametrize(
    ("rows", "theirs"),
    [(OPEN, "OPEN"), (U, "U_MAZE"), (MEDIUM, "MEDIUM_MAZE"), (LARGE, "LARGE_MAZE")],
)
def test_the_mazes_are_those_of_gymnasium_robotics(rows, theirs):
    from gymnasium_robotics.envs.maze import maps

    assert parse_maze(rows) == getattr(maps, theirs)


@needs_robotics
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(
    ("name", "theirs"),
    [("Open", "Open"), ("U", "UMaze"), ("Medium", "Medium"), ("Large", "Large")],
)
def test_a_maze_is_what_gymnasium_robotics_makes_of_it(name, theirs, dense):
    """Step by step, with a goal that is put next to the start and is left behind."""
    import gymnasium_robotics

    gym.register_envs(gymnasium_robotics)
    task = TASKS[f"PointMaze-{name}{'' if dense else '-Sparse'}"]
    known = {"continuing_task": True, "reset_target": False}
    other = gym.make(f"PointMaze_{theirs}{'Dense' if dense else ''}-v3", **known)
    assert task.horizon == other.spec.max_episode_steps
    own, paid = task.make_gym(), []
    starts = [env.reset(seed=3)[0] for env in (own, other)]
    for env, start in zip((own, other), starts, strict=True):
        env.unwrapped.goal = start["achieved_goal"] + np.array([0.2, 0.1])
    for k in range(150):
        action = np.array([np.sin(k / 9), np.cos(k / 11)], np.float32)
        a, b = own.step(action), other.step(action)
        for key in task.joined:
            assert np.array_equal(a[0][key], b[0][key])
        assert a[1:4] == b[1:4]
        assert a[4]["success"] == b[4]["success"]
        state = torch.as_tensor(np.concatenate([a[0]["observation"], a[0]["achieved_goal"]]))
        goal = torch.as_tensor(a[0]["desired_goal"])
        paid.append(float(task.reward(state, goal, torch.as_tensor(action), state)))
        assert paid[-1] == pytest.approx(a[1])
    assert set(paid) == {0.0, 1.0} if not dense else len(set(paid)) > 100
    Path(other.unwrapped.tmp_xml_file_path).unlink()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least 3 rows"),
        (["###", "#.#"], "at least 3 rows"),
        (["####", "#..#", "###"], r"lengths \[3, 4\]"),
        (["####", "#.x#", "####"], r"got \['x'\]"),
        (["####", "#...", "####"], "gap"),
        (["###", "#.#", "###"], "1 starts and 1 goals"),
        (["####", "#cg#", "####"], "1 starts and 2 goals"),
        (["####", "#rr#", "####"], "2 starts and 0 goals"),
        (["####", "####", "####"], "0 starts and 0 goals"),
        (["##", "##", "##"], r"lengths \[2\]"),
        (["####", "####"], "got 2 rows"),
        (["#.##", "#..#", "####"], "gap"),
        (["####", "#..#", "#.##"], "gap"),
        (["####", "...#", "####"], "gap"),
    ],
)
def test_a_maze_that_cannot_be_is_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        parse_maze(rows)
    with pytest.raises(ValueError, match=message):
        point_maze("mine", rows)


@needs_robotics
@pytest.mark.parametrize("rows", [["####", "#rg#", "####"], ["####", "#.g#", "####"], OPEN])
def test_starts_and_goals_lie_where_the_maze_says(rows):
    env = point_maze("mine", rows).make(seed=0)
    starts, goals = (
        torch.stack([env.reset()["observation"][dims] for _ in range(10)])
        for dims in (slice(0, 2), slice(6, 8))
    )
    if rows is OPEN:
        assert len({tuple(goal) for goal in goals.round().tolist()}) > 3
        assert len({tuple(start) for start in starts.round().tolist()}) > 3
    else:  # one cell each, half a metre to the left and right of the middle, up to noise
        assert (starts - torch.tensor([-0.5, 0.0])).abs().max() <= 0.25 + 1e-6
        assert (goals - torch.tensor([0.5, 0.0])).abs().max() <= 0.25 + 1e-6


@needs_robotics
def test_the_goal_is_the_context_and_changes_between_episodes():
    task = point_maze("mine", OPEN, horizon=10)
    data = make_batched(task, 2, seed=0).rollout(30, break_when_any_done=False)
    goals = data["observation"][..., list(task.context_dims)].reshape(2, 3, 10, 2)
    assert (goals == goals[:, :, :1]).all()
    episodes = goals[:, :, 0].reshape(6, 2)
    assert len({tuple(goal) for goal in episodes.tolist()}) == 6
    obs = data["next", "observation"]
    assert torch.equal(obs[..., 4:6], obs[..., :2])  # achieved is where it is


@needs_robotics
def test_success_is_within_the_goals_radius():
    env = make_batched("PointMaze-Open", 4, seed=0)

    def to_the_goal(td):
        obs = td["observation"]
        td["action"] = (2.0 * (obs[:, 6:8] - obs[:, :2]) - 0.5 * obs[:, 2:4]).clamp(-1, 1)
        return td

    data = env.rollout(300, to_the_goal)
    obs, success = data["next", "observation"], data["next", "success"]
    near = (obs[..., :2] - obs[..., 6:8]).norm(dim=-1, keepdim=True) <= 0.45
    assert torch.equal(success, near)
    assert success[:, -1].all()
    assert not success[:, 0].all()
    assert not data["next", "terminated"].any()
    assert data["next", "truncated"][:, -1].all()


@needs_robotics
def test_options_of_the_maze_have_their_effect():
    sparse = point_maze("mine", OPEN, sparse=True, horizon=7, budget=11)
    assert (sparse.horizon, sparse.budget) == (7, 11)
    data = sparse.make(seed=0).rollout(50)
    assert data.shape == (7,)
    assert set(data["next", "reward"].flatten().tolist()) <= {0.0, 1.0}
    assert point_maze("mine", OPEN).horizon == 300  # as the smaller mazes of gymnasium-robotics
    dense = point_maze("mine", OPEN).make(seed=0).rollout(2)["next", "reward"]
    assert ((dense > 0) & (dense < 1)).all()


@needs_robotics
def test_no_file_stays_behind(monkeypatch, tmp_path):
    (tmp_path / "inner").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "inner"))
    env = point_maze("mine", U).make(seed=0)
    env.rollout(3)
    assert [p for p in Path(tmp_path).rglob("*") if p.is_file()] == []


@pytest.mark.parametrize(
    "bad", [{"horizon": 0}, {"horizon": 2.5}, {"budget": -1}, {"sparse": 1}], ids=str
)
def test_numbers_of_a_task_are_checked(bad):
    with pytest.raises((TypeError, ValueError), match=next(iter(bad))):
        point_maze("Own", OPEN, **bad)


def test_without_gymnasium_robotics_the_error_says_how_to_get_it(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: None if name == "gymnasium_robotics" else find_spec(name, *args),
    )
    task = point_maze("mine", U)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[robotics\]"'):
        task.make()
