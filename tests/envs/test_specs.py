"""TorchRL's own check of every task, and that the registry says what the environments are."""

from __future__ import annotations

import runpy

import gymnasium as gym
import pytest
import torch
from torchrl.data import Bounded
from torchrl.envs.utils import check_env_specs

from layeredrl_torchrl.envs import TASKS


def test_every_observation_has_a_name_of_its_own():
    for task in TASKS.values():
        names = task.names_of(range(task.observation_dim))
        assert len(set(names)) == task.observation_dim
        assert len(task.observation_names) in (0, task.observation_dim)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_what_the_registry_says_and_torchrl_checks(name):
    task = TASKS[name]
    if task.joined:
        pytest.importorskip("gymnasium_robotics")
    env = task.make(seed=0)
    check_env_specs(env, seed=None)
    obs = env.observation_spec["observation"]
    assert obs.shape == (task.observation_dim,)
    assert obs.dtype == torch.float32
    assert env.action_spec.shape == (task.action_dim,)
    assert isinstance(env.action_spec, Bounded)
    extra = {"success"} if task.reports_success else set()
    assert set(env.observation_spec.keys()) == {"observation"} | extra
    assert set(task.state_dims).isdisjoint(task.context_dims)
    assert task.make_gym().spec.max_episode_steps == task.horizon
    env.close()


def test_budgets_and_returns_are_those_of_the_published_results():
    """README and ``benchmarks/RESULTS.md`` were measured with these."""
    budgets = {name: task.budget for name, task in TASKS.items() if task.budget != 20_000}
    assert budgets == {
        "InvertedPendulum-v5": 2_000,
        **dict.fromkeys(("InvertedDoublePendulum-v5", "CartPoleSwingUp", "Reacher-v5"), 5_000),
    }
    assert {name: task.solved_at for name, task in TASKS.items() if task.solved_at is not None} == {
        "InvertedPendulum-v5": 1000.0,  # the most there is
        "InvertedDoublePendulum-v5": gym.spec("InvertedDoublePendulum-v5").reward_threshold,
        "CartPoleSwingUp": 180.0,  # our own; sampling on the true dynamics gets 226
        "Reacher-v5": -5.0,  # our own; gymnasium's threshold is -3.75
    }


def test_the_table_lists_every_task(capsys):
    runpy.run_module("layeredrl_torchrl.envs", run_name="__main__")  # python -m
    shown, _, legend = capsys.readouterr().out.partition("\n\n")
    head, rule, *rows = shown.splitlines()
    assert len(rows) == len(TASKS)
    assert set(rule) == {"|", "-"}
    assert {len(line) for line in shown.splitlines()} == {len(head)}
    named = [column.strip() for column in head.strip("|").split("|")[1:]]
    assert all(column in legend for column in named)
    cells = [cell.strip() for cell in rows[list(TASKS).index("Reacher-v5")].strip("|").split("|")]
    assert cells == ["Reacher-v5", "8", "2", "2", "50", "5,000", "-5", "of next state", "never"]
    known = {row.split("|")[1].strip(): [x.strip() for x in row.split("|")[-3:-1]] for row in rows}
    assert known["CartPoleSwingUp"] == ["of state", "never"]
    assert known["Ant-v5"] == ["no", "of next state"]
    assert known["Hopper-v5/x"] == ["of next state", "of next state"]
