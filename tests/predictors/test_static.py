"""A hand-written physics model, with plain functions as reward and value."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from helpers import known, make_buffer, unchanged
from tensordict import TensorDict
from torchrl.data import Bounded

from layeredrl_torchrl import IdentityEncoder, PredictorEnv, RewardPredictor, StaticPredictor

DT = 0.05


def move(state, action):
    """A pendulum by Euler's rule, known exactly."""
    angle, speed = state.unbind(-1)
    return torch.stack([angle + DT * speed, speed + DT * (torch.sin(angle) + action[..., 0])], -1)


def reward(state, context, action):
    return -state[..., 0].square() - 0.1 * action[..., 0].square()


def value(state, context, action):
    return -2.0 * state[..., 0].abs()


@pytest.fixture
def predictor():
    return known(move, reward, Bounded(-2.0, 2.0, (1,)), width=2, value=value)


def simulate(angle, speed, torques):
    """The same physics in plain floats: states and rewards of every step."""
    states, rewards = [(angle, speed)], []
    for torque in torques:
        rewards.append(-(angle**2) - 0.1 * torque**2)
        angle, speed = angle + DT * speed, speed + DT * (math.sin(angle) + torque)
        states.append((angle, speed))
    return states, rewards


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_rollout_is_the_simulation(predictor, deterministic):
    obs, act = torch.randn(3, 2), 4 * torch.rand(3, 12, 1) - 2
    traj = predictor.rollout(obs, act, deterministic=deterministic)
    assert traj.batch_size == (3, 1, 1, 12)
    for i in range(3):
        states, rewards = simulate(*obs[i].tolist(), act[i, :, 0].tolist())
        one = traj[i, 0, 0]
        torch.testing.assert_close(one["state"], torch.tensor(states[:-1]))
        torch.testing.assert_close(one["next", "state"], torch.tensor(states[1:]))
        torch.testing.assert_close(one["next", "reward"][:, 0], torch.tensor(rewards))


def test_one_step_calls_are_the_simulation(predictor):
    obs, act = torch.tensor([[0.5, -1.0]]), torch.tensor([[1.5]])
    states, rewards = simulate(0.5, -1.0, [1.5])
    mean, weights, std, predicted, term_prob = predictor.predict(obs, act)
    torch.testing.assert_close(mean, torch.tensor(states[1:]).view(1, 1, 1, 2))
    assert weights.tolist() == [[[1.0]]]
    assert std.tolist() == [[[[0.0, 0.0]]]]
    torch.testing.assert_close(predicted, torch.tensor(rewards))
    torch.testing.assert_close(predictor.predict_reward(obs, act), torch.tensor(rewards))
    assert term_prob.tolist() == [0.0]
    assert predictor.value(obs).tolist() == [-1.0]
    assert predictor.value(obs, act).tolist() == [-1.0]


def test_a_known_model_has_no_density(predictor):
    td = TensorDict({"state": torch.zeros(1, 2), "action": torch.zeros(1, 1)}, [1])
    with pytest.raises(ValueError, match="standard deviation of 0"):
        predictor.model.dist(td)


def test_learn_returns_at_once_and_says_so(predictor, caplog):
    buffer = make_buffer()
    with caplog.at_level(logging.INFO, logger="layeredrl_torchrl"), unchanged(predictor):
        loss, info = predictor.learn(buffer, 1000, 256, 256, 10_000)
    assert loss.shape == ()
    assert loss.item() == 0.0
    assert info == {"n_updates": 0.0}
    assert "nothing to learn" in caplog.text
    assert list(predictor.parameters()) == []
    assert all(name.startswith("encoder.") for name in predictor.state_dict())
    with pytest.raises(TypeError, match=r"torchrl.*Logger.*got str"):
        predictor.learn(buffer, 1, 1, 1, 0, logger="tensorboard")


def test_models_of_another_kind_are_refused(predictor):
    with pytest.raises(TypeError, match="StaticPredictor"):
        RewardPredictor(predictor.model, value, reward, predictor.encoder, 2)
    with pytest.raises(TypeError, match="Model"):
        StaticPredictor(torch.nn.Linear(2, 2), value, reward, IdentityEncoder((2,)), 2)


def test_known_physics_are_exact_in_double_precision(predictor):
    predictor.double()
    obs, act = torch.randn(2, dtype=torch.float64), torch.rand(50, 1, dtype=torch.float64)
    traj = predictor.rollout(obs, act)[0, 0]
    states, rewards = simulate(*obs.tolist(), act[:, 0].tolist())
    expected = torch.tensor(states[1:], dtype=torch.float64)
    torch.testing.assert_close(traj["next", "state"], expected, rtol=1e-12, atol=1e-12)
    assert traj["next", "reward"][-1].item() == pytest.approx(rewards[-1], rel=1e-12)
    env = PredictorEnv(predictor)
    imagined = env.step(env.reset().set("action", act[0]))["next", "state"]
    assert imagined.dtype == env.observation_spec["state"].dtype == torch.float64
