"""The arm that is observed from its tip, against MuJoCo and gymnasium's Reacher-v5."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from layeredrl_torchrl.envs import get_task, make_batched
from layeredrl_torchrl.envs.reacher import ReacherTipEnv

TASK = get_task("Reacher-Tip")
TIP, TARGET = [0, 1], list(TASK.context_dims)


@pytest.fixture
def env():
    env = TASK.make_gym()
    env.reset(seed=0)
    yield env
    env.close()


def posed(env, angles, target, speed=0.0):
    """What is seen of the arm with these joint angles, and of a target."""
    env.unwrapped.set_state(np.array([*angles, *target]), np.array([speed, speed, 0.0, 0.0]))
    return env.unwrapped._get_obs()


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_gymnasiums_check_finds_nothing_wrong():
    check_env(ReacherTipEnv(), skip_render_check=True)


def test_it_is_reacher_with_the_tips_place_instead_of_the_way_to_the_target(env):
    """Side by side with the same seed and torques."""
    other = get_task("Reacher-v5").make_gym(max_episode_steps=200)
    ours, theirs = env.reset(seed=3)[0], other.reset(seed=3)[0]
    env.action_space.seed(3)
    for step in range(200):
        body = env.unwrapped
        np.testing.assert_array_equal(ours[TIP], body.get_body_com("fingertip")[:2])
        np.testing.assert_allclose(ours[TARGET], body.get_body_com("target")[:2], atol=1e-12)
        np.testing.assert_array_equal(
            ours[[*range(2, 8), *TARGET]], theirs[[0, 1, 2, 3, 6, 7, 4, 5]]
        )
        np.testing.assert_allclose(ours[TIP], theirs[8:10] + theirs[4:6], atol=1e-12)
        action = env.action_space.sample()
        (ours, reward, terminated, truncated, info), (theirs, *_) = (
            body.step(action) for body in (env, other)
        )
        distance = np.hypot(*theirs[8:10])
        assert reward == pytest.approx(np.exp(-10.0 * distance))
        assert info["success"] == (distance <= 0.02)
        assert not terminated
        assert truncated == (step == 199)
    other.close()


def test_the_tip_is_where_the_joints_put_it_and_no_state_says_where_the_target_is(env):
    for shoulder, elbow in ((0.0, 0.0), (1.0, -0.5), (-2.0, 2.5)):
        seen = posed(env, (shoulder, elbow), (0.1, 0.1), speed=2.0)
        both = shoulder + elbow
        x = 0.1 * np.cos(shoulder) + 0.11 * np.cos(both)
        y = 0.1 * np.sin(shoulder) + 0.11 * np.sin(both)
        np.testing.assert_allclose(seen[TIP], [x, y], atol=1e-9)
        np.testing.assert_allclose(
            seen[2:6], [*np.cos([shoulder, elbow]), *np.sin([shoulder, elbow])]
        )
        np.testing.assert_array_equal(seen[6:8], [2.0, 2.0])
        state = list(TASK.state_dims)
        elsewhere = posed(env, (shoulder, elbow), (-0.15, 0.05), speed=2.0)
        np.testing.assert_array_equal(elsewhere[state], seen[state])
        np.testing.assert_allclose(elsewhere[TARGET], [-0.15, 0.05])


@pytest.mark.parametrize(("away", "reached"), [(0.0, True), (0.0195, True), (-0.0205, False)])
def test_a_target_is_reached_within_two_centimetres(env, away, reached):
    # At rest and without torques it stays.
    posed(env, (0.5, 0.0), (0.21 * np.cos(0.5), 0.21 * np.sin(0.5) + away))
    _, reward, _, _, info = env.step(np.zeros(2, np.float32))
    assert info["success"] == reached
    assert reward == pytest.approx(np.exp(-abs(away) / 0.1))


def test_a_batch_reports_success():
    env = make_batched(TASK, 3, seed=0)
    data = env.rollout(250, break_when_any_done=False)
    near = (data["next", "observation"][..., TIP] - data["next", "observation"][..., TARGET]).norm(
        dim=-1, keepdim=True
    ) <= 0.02
    assert (near == data["next", "success"]).all()
    assert near.any()
    assert data["next", "done"][:, 199].all()
