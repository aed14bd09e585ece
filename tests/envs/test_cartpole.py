"""The swing-up: its physics, its start, and that it can be solved."""

from __future__ import annotations

import math

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from layeredrl_torchrl.envs import get_task
from layeredrl_torchrl.envs.cartpole import CartPoleSwingUpEnv

TASK = get_task("CartPoleSwingUp")


@pytest.fixture
def env():
    env = CartPoleSwingUpEnv()
    env.reset(seed=0)
    return env


def step(env, force):
    return env.step(np.array([force], dtype=np.float32))


def episode(policy, seed):
    env = TASK.make_gym()
    obs, _ = env.reset(seed=seed)
    score, done, rewards = 0.0, False, []
    while not done:
        obs, reward, terminated, done, _ = step(env, policy(obs))
        assert not terminated
        assert 0.0 <= reward <= 1.0
        rewards.append(reward)
        score += reward
    assert len(rewards) == TASK.horizon
    return score


def test_gymnasiums_check_finds_nothing_wrong():
    with pytest.warns(UserWarning, match="infinity"):  # observations are unbounded, as MuJoCo's
        check_env(CartPoleSwingUpEnv(), skip_render_check=True)


def test_it_starts_hanging_in_the_middle_and_stays_there_without_force(env):
    obs, _ = env.reset(seed=1)
    assert obs[2] < -0.95
    assert abs(obs[0]) < 0.25
    assert episode(lambda obs: 0.0, seed=1) < 5.0


def test_the_reward_belongs_to_the_state_in_which_the_action_is_taken(env):
    obs, _ = env.reset(seed=2)
    for force in (1.0, -1.0, 0.5):
        expected = (1 + obs[2]) / 2 * math.exp(-(obs[0] ** 2) / 2)
        obs, reward, *_ = step(env, force)
        assert reward == pytest.approx(expected)


def test_a_leaning_pole_falls_further_and_a_force_accelerates_the_cart_in_si_units(env):
    env.set_state(np.array([0.0, 0.01]), np.zeros(2))
    obs = step(env, 0.0)[0]
    assert obs[1] == pytest.approx(math.sin(0.01), abs=2e-3)
    assert obs[4] > 0  # it falls further to where it leans
    env.set_state(np.array([0.0, math.pi]), np.zeros(2))
    obs = step(env, 1.0)[0]
    # 10 N on 1.2 kg, of which the hanging pole follows only in part.
    assert 10 / 1.2 * 0.04 <= obs[3] <= 10 / 1.0 * 0.04
    assert 0 < obs[0] < 0.02
    assert (obs[1] ** 2 + obs[2] ** 2) == pytest.approx(1.0)


def test_energy_is_lost_slowly_without_force(env):
    env.set_state(np.array([0.0, math.pi / 2]), np.zeros(2))
    heights = [step(env, 0.0)[0][2] for _ in range(100)]
    assert max(heights) < 0.02  # it gains none
    assert max(heights[50:]) > -0.3  # and swings on


def test_the_rail_ends_and_it_runs_at_25_hertz(env):
    assert env.dt == pytest.approx(0.04)
    assert env.metadata["render_fps"] == 25
    xs = [step(env, 1.0)[0][0] for _ in range(100)]
    assert 1.7 < max(xs) < 2.0


def test_the_noise_at_the_start_has_the_given_std():
    starts = [CartPoleSwingUpEnv(0.0).reset(seed=seed)[0] for seed in range(3)]
    np.testing.assert_allclose(starts, [[0, 0, -1, 0, 0]] * 3, atol=1e-12)
    for env, std in ((CartPoleSwingUpEnv(), 0.05), (CartPoleSwingUpEnv(0.5), 0.5)):
        assert np.std([env.reset()[0][3] for _ in range(200)]) == pytest.approx(std, rel=0.2)
    with pytest.raises(ValueError, match="reset_noise_scale must be at least 0, got -1"):
        CartPoleSwingUpEnv(-1.0)


def swing_up(obs):
    """Pump energy until the pole is nearly up, then hold it with linear feedback."""
    x, sin, cos, speed, turn = obs
    if cos > 0.85:
        angle = math.atan2(sin, cos)
        force = 1.0 * x + 1.6 * speed + 22.0 * angle + 4.0 * turn
        return float(np.clip(force / 10.0 * 1.5, -1, 1))
    # Energy of the pole as a rod (per m l²): 1/6 turn² + g/(2 l) cos, at most g/(2 l).
    missing = 9.81 / 1.2 * (1.02 - cos) - turn**2 / 6.0
    pump = -np.sign(turn * cos) * np.clip(missing, -1, 1)
    return float(np.clip(pump - 0.4 * x - 0.2 * speed, -1, 1))


def test_a_hand_written_controller_solves_it_and_chance_does_not():
    scores = [episode(swing_up, seed) for seed in range(3)]
    assert min(scores) > TASK.solved_at
    rng = np.random.default_rng(0)
    chance = [episode(lambda obs: rng.uniform(-1, 1), seed) for seed in range(3)]
    assert max(chance) < TASK.solved_at / 3
