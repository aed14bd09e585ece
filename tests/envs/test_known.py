"""Rewards and terminations in closed form against what MuJoCo's environments really give."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from layeredrl_torchrl import FixedEncoderNet, StaticPredictor
from layeredrl_torchrl.envs import TASKS, get_task
from layeredrl_torchrl.envs.known import InRange, never

MAZES = [name for name in TASKS if name.startswith("PointMaze")]
KNOWN = [name for name, task in TASKS.items() if task.reward is not None and name not in MAZES]
# The double pendulum's tip is read where the integrator saw it last.
TOLERANCE = {"InvertedDoublePendulum-v5": 2e-3}


@pytest.fixture
def play():
    """Play random actions in gymnasium's own environment; float64, no TorchRL in between."""

    def play(task, steps=300, seed=3, scale=1.0, **kwargs):
        if task.name in MAZES:
            pytest.importorskip("gymnasium_robotics")
        env = task.make_gym(**kwargs)
        env.action_space.seed(seed)
        rows, obs = [], _join(task, env.reset(seed=seed)[0])
        for _ in range(steps):
            action = scale * env.action_space.sample()
            following, reward, terminated, truncated, _ = env.step(action)
            following = _join(task, following)
            rows.append((obs, action.astype(np.float64), following, reward, terminated))
            obs = following
            if terminated or truncated:
                obs = _join(task, env.reset()[0])
        env.close()
        columns = zip(*rows, strict=True)
        return [torch.as_tensor(np.array(column)) for column in columns]

    return play


def _join(task, obs):
    return np.concatenate([obs[key] for key in task.joined]) if task.joined else obs


def split(task, obs):
    return obs[..., list(task.state_dims)], obs[..., list(task.context_dims)]


@pytest.mark.parametrize("name", [*KNOWN, *MAZES])
def test_the_known_reward_is_the_environments_reward(name, play):
    task = pickle.loads(pickle.dumps(TASKS[name]))
    assert (task.name, task.reward) == (name, TASKS[name].reward)
    obs, action, following, reward, _ = play(task)
    (state, context), (next_state, _) = split(task, obs), split(task, following)

    ours = task.reward(state, context, action, next_state)

    assert ours.shape == reward.shape
    # Else any constant would pass; a sparse goal is hit by chance at most.
    assert reward.double().std() > 1e-4 or name.endswith("-Sparse")
    tolerance = TOLERANCE.get(name, 1e-6)  # they square actions in float32
    torch.testing.assert_close(ours, reward.to(ours), atol=tolerance, rtol=0)
    # Batched equals one by one, in float32 too, and with a batch shape of two axes.
    parts = (x[:6].float().reshape(2, 3, -1) for x in (state, context, action, next_state))
    again = task.reward(*parts)
    assert again.shape == (2, 3)
    assert again.dtype == torch.float32
    torch.testing.assert_close(again.flatten().double(), ours[:6].double(), atol=2e-3, rtol=1e-4)


def test_a_double_pendulums_cart_pays_for_its_place():
    """Random forces leave it near the middle."""
    task = TASKS["InvertedDoublePendulum-v5"]
    env = task.make_gym()
    env.reset(seed=0)
    for place in (-0.9, 0.9):
        env.unwrapped.set_state(np.array([place, 0.0, 0.0]), np.zeros(3))
        obs, reward, *_ = env.step(np.zeros(1, np.float32))
        state = split(task, torch.as_tensor(obs))[0]
        assert task.reward(None, None, None, state).item() == pytest.approx(reward, abs=2e-3)
    env.close()


@pytest.mark.parametrize("name", TASKS)
def test_the_known_termination_is_the_environments(name, play):
    task = TASKS[name]
    obs, action, following, _, terminated = play(task)
    (state, context), (next_state, _) = split(task, obs), split(task, following)
    ours = task.termination(state, context, action, next_state)
    assert ours.dtype == torch.bool
    assert torch.equal(ours, terminated)
    assert bool(ours.any()) == (task.termination is not never and not name.startswith("Ant"))


@pytest.mark.parametrize(
    "name", ["Hopper-v5", "Hopper-v5/x", "Walker2d-v5", "Walker2d-v5/x", "Ant-v5"]
)
def test_ranges_end_where_gymnasiums_do(name):
    """At each bound of height and angle by itself; random actions reach some of them only."""
    task = TASKS[name]
    env = task.make_gym()
    body = env.unwrapped
    env.reset(seed=0)
    height, angles = (2, ()) if name == "Ant-v5" else (1, body._healthy_angle_range)
    bounds = [(height, z) for z in body._healthy_z_range] + [(2, a) for a in angles]
    if name.startswith("Hopper"):
        bounds += [(joint, end) for joint in (3, 4, 5) for end in body._healthy_state_range]
    for d, bound in bounds:
        for off in (-1e-3, 1e-3):
            qpos = body.init_qpos.copy()
            qpos[d] = bound + off if math.isfinite(bound) else 50.0
            body.set_state(qpos, body.init_qvel)
            state = torch.as_tensor(body._get_obs()).float()
            assert bool(task.termination(state, state[:0], state[:3], state)) != body.is_healthy
    env.close()


def test_an_ant_out_of_its_heights_has_ended():
    # Random actions do not get the ant there, so it is put there.
    env = TASKS["Ant-v5"].make_gym()
    env.reset(seed=0)
    ant, termination = env.unwrapped, TASKS["Ant-v5"].termination
    for z in (0.5, 1.5):
        qpos = ant.init_qpos.copy()
        qpos[2] = z
        ant.set_state(qpos, ant.init_qvel)
        obs, _, terminated, *_ = env.step(np.zeros(8, dtype=np.float32))
        state = torch.as_tensor(obs)
        assert bool(termination(state, state[:0], torch.zeros(8), state)) == terminated == (z > 1)
    state[0] = 0.19
    assert termination(state, state[:0], torch.zeros(8), state)
    env.close()


def test_where_x_is_not_observed_the_reward_is_not_known(play):
    task = TASKS["HalfCheetah-v5"]
    assert task.reward is None
    with pytest.raises(ValueError, match=r"HalfCheetah-v5 is not a function of its obs.*RewardNet"):
        task.rew_func()
    observed = play(TASKS["HalfCheetah-v5/x"], steps=5)[0]
    hidden = play(task, steps=5)[0]
    torch.testing.assert_close(observed[:, 1:], hidden)  # the same task, and x


@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("closed", [True, False])
def test_ranges_include_their_ends_only_if_closed(low, closed):
    check = InRange(((1, -2.0, 3.0),), closed)
    state = torch.tensor([[0.0, -2.0 if low else 3.0]])
    assert bool(check(state, state, state, state)) != closed
    for value in (math.nan, math.inf, -math.inf):  # what is not finite has ended
        state = torch.tensor([0.0, value])
        assert bool(InRange(())(state, state, state, state))


def test_rew_func_takes_three_arguments_where_the_next_state_does_not_matter():
    state, context, action = torch.randn(4, 5), torch.zeros(4, 0), torch.zeros(4, 1)
    task = get_task("CartPoleSwingUp")
    rew_func = task.rew_func()
    assert not getattr(rew_func, "reads_next_state", False)
    expected = task.reward(state, context, action, torch.full_like(state, math.nan))
    assert torch.equal(rew_func(state, context, action), expected)


@pytest.mark.parametrize("name", ["Reacher-v5", "InvertedPendulum-v5", "Hopper-v5/x"])
def test_rew_func_and_term_func_say_that_they_read_the_next_state(name, play):
    task = TASKS[name]
    obs, action, following, reward, terminated = play(task, steps=60)
    (state, context), (next_state, _) = split(task, obs), split(task, following)
    rew_func, term_func = (pickle.loads(pickle.dumps(f())) for f in (task.rew_func, task.term_func))
    assert rew_func.reads_next_state
    assert term_func.reads_next_state
    found = rew_func(state, context, action, next_state)
    torch.testing.assert_close(found, reward.to(found), atol=1e-6, rtol=0)
    assert torch.equal(term_func(state, context, action, next_state), terminated)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_gives_predictors_what_is_known(name, make_ensemble):
    """In a predictor of an untrained model: rewards and terminations of its own next states."""
    task = TASKS[name]
    dims = len(task.state_dims), len(task.context_dims)
    predictor = StaticPredictor(
        make_ensemble(*dims, task.action_dim),
        None,
        task.rew_func() if task.reward else None,
        FixedEncoderNet((task.observation_dim,), task.state_dims, task.context_dims),
        *dims,
        term_func=task.term_func(),
    )
    obs, actions = torch.randn(3, task.observation_dim), torch.zeros(3, 4, task.action_dim)
    traj = predictor.rollout(obs, actions)
    steps = [traj[key] for key in ("state", "context", "action", ("next", "state"))]
    ended = task.termination(*steps).unsqueeze(-1)
    assert torch.equal(traj["next", "term_prob"], ended.float())
    if task.reward:
        assert torch.equal(traj["next", "reward"], task.reward(*steps).unsqueeze(-1))


def test_a_termination_that_is_not_known_is_named():
    task = replace(TASKS["Hopper-v5"], name="mine", termination=None)
    with pytest.raises(ValueError, match=r"termination of mine is not known.*have it learned"):
        task.term_func()


@pytest.mark.parametrize("name", ["Reacher-v5", "Reacher-Tip", "Pusher-v5", *MAZES[::2]])
def test_the_context_is_constant_in_an_episode_and_the_rest_is_not(name, play):
    task = TASKS[name]
    obs, _, following, *_ = play(task, steps=40)
    (state, context), (next_state, next_context) = split(task, obs), split(task, following)
    assert torch.equal(context, context[:1].expand_as(context))
    assert torch.equal(context, next_context)
    assert (state != next_state).any(0).sum() >= state.shape[1] - 3  # Pusher's object rests
    other = split(task, play(task, steps=1, seed=4)[0])[1]
    assert torch.equal(other[0], context[0]) == (name == "Pusher-v5")


def test_horizons_are_time_limits_and_can_be_changed(play):
    for name in ("Reacher-v5", "CartPoleSwingUp"):
        for kwargs, limit in (({}, TASKS[name].horizon), ({"max_episode_steps": 7}, 7)):
            env = TASKS[name].make(seed=0, **kwargs)
            data = env.rollout(400)
            assert data.shape == (limit,)
            assert data["next", "truncated"].squeeze(-1).nonzero().tolist() == [[limit - 1]]


def test_keyword_arguments_reach_the_environment():
    env = TASKS["Reacher-v5"].make(seed=0, reward_control_weight=0.0)
    env.reset()
    step = env.rand_step()
    expected = -step["next", "observation"][8:10].norm()
    torch.testing.assert_close(step["next", "reward"].squeeze(), expected)


def test_unknown_names_raise_with_the_nearest():
    with pytest.raises(KeyError, match=r"no task is called 'Reacher-v4'.*Reacher-v5"):
        get_task("Reacher-v4")
    with pytest.raises(KeyError, match=r"InvertedPendulum-v5.*PointMaze-Medium"):
        get_task("@@")
    assert get_task("Hopper-v5") is TASKS["Hopper-v5"]


def test_the_registry_is_read_only():
    with pytest.raises(TypeError, match="does not support item assignment"):
        TASKS["mine"] = TASKS["Hopper-v5"]
