"""A hand-written physics model, with plain functions as reward and value."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Unbounded

from layeredrl_torchrl import IdentityEncoder, Model, RewardPredictor, StaticPredictor

DT = 0.05


class Pendulum(Model):
    """A pendulum by Euler's rule, known exactly; it never ends."""

    def __init__(self):
        super().__init__(Unbounded((2,)), None, Bounded(-2.0, 2.0, (1,)))

    def predict_members(self, state, context, action):
        angle, speed = state.unbind(-1)
        following = torch.stack(
            [angle + DT * speed, speed + DT * (torch.sin(angle) + action[..., 0])], -1
        )
        mean = following.unsqueeze(-2)
        ones = torch.ones_like(mean[..., 0])
        return (mean, torch.zeros_like(mean)), ones, torch.zeros_like(angle)


def reward(state, context, action):
    return -state[..., 0].square() - 0.1 * action[..., 0].square()


def value(state, context, action):
    return -2.0 * state[..., 0].abs()


@pytest.fixture
def predictor():
    return StaticPredictor(
        model=Pendulum(),
        val_func=value,
        rew_func=reward,
        encoder=IdentityEncoder((2,)),
        latent_state_dim=2,
        context_dim=0,
    )


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


def test_one_step_calls(predictor):
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


def test_with_a_tensordict(predictor):
    obs, act = torch.randn(2, 3, 2), torch.rand(2, 3, 1)
    td = predictor(TensorDict({"observation": obs, "action": act}, [2, 3]))
    mean, _, _, predicted, _ = predictor.predict(obs, act)
    torch.testing.assert_close(td["next", "state"], mean.squeeze((-3, -2)))
    torch.testing.assert_close(td["next", "reward"].squeeze(-1), predicted)
    assert not td["next", "done"].any()


def test_a_known_model_has_no_density(predictor):
    td = TensorDict({"state": torch.zeros(1, 2), "action": torch.zeros(1, 1)}, [1])
    with pytest.raises(ValueError, match="standard deviation of 0"):
        predictor.model.dist(td)


def test_learn_returns_at_once_and_says_so(predictor, make_buffer, unchanged, caplog):
    buffer = make_buffer()
    with caplog.at_level(logging.INFO, logger="layeredrl_torchrl"), unchanged(predictor):
        loss, info = predictor.learn(buffer, 1000, 256, 256, 10_000)
    assert loss.shape == ()
    assert loss.item() == 0.0
    assert info == {"n_updates": 0.0}
    assert "nothing to learn" in caplog.text


def test_it_has_no_parameters_and_an_empty_state(predictor):
    assert list(predictor.parameters()) == []
    assert all(name.startswith("encoder.") for name in predictor.state_dict())


def test_a_reward_predictor_refuses_a_known_model(predictor):
    with pytest.raises(TypeError, match="StaticPredictor"):
        RewardPredictor(predictor.model, value, reward, predictor.encoder, 2)


def test_a_model_that_is_none_is_refused():
    with pytest.raises(TypeError, match="Model"):
        StaticPredictor(torch.nn.Linear(2, 2), value, reward, IdentityEncoder((2,)), 2)
