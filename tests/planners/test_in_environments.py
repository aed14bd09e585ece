"""Planners as policies: rollouts, batched environments, collectors, worker processes."""

from __future__ import annotations

import gymnasium as gym
import pytest
import torch
from torchrl.collectors import Collector
from torchrl.data import Bounded, Unbounded
from torchrl.envs import (
    ActionDiscretizer,
    GymEnv,
    GymWrapper,
    SerialEnv,
    StepCounter,
    TransformedEnv,
)
from torchrl.envs.utils import check_env_specs

from layeredrl_torchrl import (
    ICEMPlanner,
    IdentityEncoder,
    Model,
    PredictorFactory,
    StaticPredictor,
)


class Drift(Model):
    """Something simple in the shape of the pendulum's observations and actions."""

    def __init__(self):
        super().__init__(Unbounded((4,)), None, Bounded(-3.0, 3.0, (1,)))

    def predict_members(self, state, context, action):
        after = (state + 0.1 * action).unsqueeze(-2)
        weights = torch.ones_like(after[..., 0])
        return (after, torch.zeros_like(after)), weights, torch.zeros_like(weights[..., 0])


@pytest.fixture
def planner(kind):
    predictor = StaticPredictor(
        Drift(), None, lambda s, c, a: -s.square().sum(-1), IdentityEncoder((4,)), 4
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


def test_in_a_rollout_of_one_environment(planner):
    env = pendulum().append_transform(planner.make_tensordict_primer())
    env.set_seed(0)
    data = env.rollout(25, planner, break_when_any_done=False)
    assert data.batch_size == (25,)
    check(data, planner, env.base_env.action_spec)


def test_in_a_rollout_of_several(planner):
    env = TransformedEnv(SerialEnv(3, pendulum), planner.make_tensordict_primer())
    check_env_specs(env)
    env.set_seed(0)
    data = env.rollout(20, planner, break_when_any_done=False)
    assert data.batch_size == (3, 20)
    check(data, planner, env.base_env.action_spec_unbatched)
    ends = data["next", "done"][..., 0]
    assert (ends.any(0) & ~ends.all(0)).any()  # some instance was reset alone


def test_over_a_vector_environment(planner):
    mode = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}
    vector = gym.make_vec(
        "InvertedPendulum-v5", num_envs=2, vectorization_mode="sync", vector_kwargs=mode
    )
    env = TransformedEnv(GymWrapper(vector), planner.make_tensordict_primer())
    data = env.rollout(30, planner, break_when_any_done=False)
    assert data.batch_size == (2, 30)
    check(data, planner, env.base_env.action_spec_unbatched)


@pytest.mark.parametrize("categorical", [True, False])
def test_actions_that_torchrl_has_discretized(categorical):
    make = lambda: pendulum().append_transform(ActionDiscretizer(5, categorical=categorical))  # noqa: E731
    for env in (make(), SerialEnv(2, make)):
        spaces = env.observation_spec_unbatched, env.full_action_spec_unbatched
        planner = ICEMPlanner(
            PredictorFactory(hidden_sizes=(8,), n_models=2)(*spaces),
            horizon=3,
            n_samples=24,
            n_iterations=2,
        )
        env = TransformedEnv(env, planner.make_tensordict_primer())
        data = env.rollout(20, planner, break_when_any_done=False)
        choices = data["action"].squeeze(-1) if categorical else data["action"].long().argmax(-1)
        assert choices.shape == (*env.batch_size, 20)
        assert len(choices.unique()) > 1


@pytest.mark.parametrize("n", [None, 2])
def test_in_a_collector(planner, n):
    env = pendulum() if n is None else SerialEnv(n, pendulum)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        env.set_seed(0)
        collector = Collector(
            env,
            planner,
            frames_per_batch=24,
            total_frames=48,
            auto_register_policy_transforms=True,
        )
        batches = [data.clone() for data in collector]
        collector.shutdown(close_env=False)
        results.append(torch.cat(batches, -1))
    check(results[0], planner, Bounded(-3.0, 3.0, (1,)))
    assert torch.equal(results[0]["action"], results[1]["action"])


def test_random_steps_first_leave_the_memory_cold(planner):
    collector = Collector(
        pendulum(),
        planner,
        frames_per_batch=5,
        total_frames=15,
        init_random_frames=5,
        auto_register_policy_transforms=True,
    )
    random, first, _ = [data.clone() for data in collector]
    collector.shutdown()
    assert not random["planner", "warm"].any()
    assert not first["planner", "warm"][0]
    assert first["next", "planner", "warm"].all()
