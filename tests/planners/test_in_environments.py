"""Planners as policies: rollouts, batched environments, collectors, worker processes."""

from __future__ import annotations

import gymnasium as gym
import pytest
import torch
from helpers import SMALL_FACTORY, SMALL_PLANNER, collected, known, make_point
from torchrl.data import Bounded
from torchrl.envs import (
    ActionDiscretizer,
    GymEnv,
    GymWrapper,
    SerialEnv,
    StepCounter,
    TransformedEnv,
)
from torchrl.envs.utils import check_env_specs

from layeredrl_torchrl import PredictorEnv
from layeredrl_torchrl.optimizers import CEM, GaussianSearch
from layeredrl_torchrl.planners import PredictorPlanner


@pytest.fixture
def planner(kind):
    """In something simple in the shape of the pendulum's observations and actions."""
    predictor = known(
        lambda state, action: state + 0.1 * action,
        lambda s, c, a: -s.square().sum(-1),
        Bounded(-3.0, 3.0, (1,)),
        width=4,
    )
    return kind(predictor, horizon=3, n_samples=24, n_iterations=2)


def pendulum():
    return TransformedEnv(GymEnv("InvertedPendulum-v5"), StepCounter(7))


def check(data, planner, spec):
    """Actions in their bounds; memory carried by one step, and cleared at resets alone.

    ``data`` is ``[*b, T]`` with a batch of at most one axis.
    """
    assert spec.is_in(data["action"])
    assert data["action"].std() > 0
    for row in data if data.ndim == 2 else data.unsqueeze(0):
        warm = row["planner", "warm"][:, 0]
        ended = row["next", "done"][:, 0]
        assert not warm[0]
        assert torch.equal(warm[1:], ~ended[:-1])
        assert row["next", "planner", "warm"].all()
        for key in planner.optimizer.memory_spec.keys():
            handed, got = row["next", "planner", key][:-1], row["planner", key][1:]
            assert torch.equal(got[~ended[:-1]], handed[~ended[:-1]])
            assert not got[ended[:-1]].any()
        assert ended.any()


def vector():
    mode = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}
    options = {"num_envs": 2, "vectorization_mode": "sync", "vector_kwargs": mode}
    return GymWrapper(gym.make_vec("InvertedPendulum-v5", **options))


@pytest.mark.parametrize("make", [pendulum, lambda: SerialEnv(3, pendulum), vector])
def test_in_a_rollout_the_memory_is_carried_and_cleared_at_resets(planner, make):
    env = TransformedEnv(make(), planner.make_tensordict_primer())
    check_env_specs(env)
    env.set_seed(0)
    data = env.rollout(30, planner, break_when_any_done=False)
    assert data.batch_size == (*env.batch_size, 30)
    check(data, planner, env.base_env.action_spec_unbatched)
    if make is not pendulum:
        ends = data["next", "done"][..., 0]
        assert (ends.any(0) & ~ends.all(0)).any()  # some instance was reset alone


@pytest.mark.parametrize("categorical", [True, False])
def test_actions_that_torchrl_has_discretized_are_planned(categorical):
    make = lambda: pendulum().append_transform(ActionDiscretizer(5, categorical=categorical))  # noqa: E731
    for env in (make(), SerialEnv(2, make)):
        spaces = env.observation_spec_unbatched, env.full_action_spec_unbatched
        planner = SMALL_PLANNER(SMALL_FACTORY(*spaces))
        env = TransformedEnv(env, planner.make_tensordict_primer())
        data = env.rollout(20, planner, break_when_any_done=False)
        choices = data["action"].squeeze(-1) if categorical else data["action"].long().argmax(-1)
        assert choices.shape == (*env.batch_size, 20)
        assert len(choices.unique()) > 1


@pytest.mark.parametrize("n", [None, 2])
def test_in_a_collector_the_memory_is_carried_and_seeds_decide(planner, n):
    env = pendulum() if n is None else SerialEnv(n, pendulum)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        env.set_seed(0)
        results.append(torch.cat(list(collected(env, planner, 2, 24)), -1))
    check(results[0], planner, Bounded(-3.0, 3.0, (1,)))
    assert torch.equal(results[0]["action"], results[1]["action"])


def test_random_steps_first_leave_the_memory_cold(planner):
    random, first, _ = collected(pendulum(), planner, 3, 5, init_random_frames=5)
    assert not random["planner", "warm"].any()
    assert not first["planner", "warm"][0]
    assert first["next", "planner", "warm"].all()


def test_an_environment_is_no_predictor(kind):
    env, optimizer = PredictorEnv(make_point()), CEM(GaussianSearch(-torch.ones(1), torch.ones(1)))
    for build in (kind, lambda env: PredictorPlanner(env, optimizer)):
        with pytest.raises(TypeError, match=r"predictor must be .*: env\.predictor"):
            build(env)
