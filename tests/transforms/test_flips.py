"""Episodes end where a walker has flipped over."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import Compose, DoubleToFloat
from torchrl.envs.utils import check_env_specs

from layeredrl_torchrl import Angle, FlipTermination, QuaternionTilt, make_batched
from layeredrl_torchrl.envs import TASKS


def make(limit=1.0, **kwargs):
    return Compose(DoubleToFloat(), FlipTermination(Angle(1), limit, **kwargs))


def test_episodes_end_where_the_angle_passes_its_limit(build):
    # 0.3 a step is beyond 1 rad after four steps, -0.6 after two; the episodes would be longer.
    env = build(make, [{"turn": 0.3, "length": 9}, {"turn": -0.6, "length": 9}])
    check_env_specs(env)
    steps, n = 8, max(env.batch_size.numel(), 1)
    (data,) = Collector(env, None, frames_per_batch=n * steps, total_frames=n * steps)
    for key in ("terminated", "done"):
        rows = data["next", key].reshape(n, steps)
        for i, period in enumerate((4, 2)[:n]):
            assert rows[i].tolist() == [(k + 1) % period == 0 for k in range(steps)]
    assert not data["next", "truncated"].any()
    rows = data["next", "observation"].reshape(n, steps, 2)
    assert rows[0, 3].tolist() == pytest.approx([4.0, 1.2])  # the true final observation


def test_the_environments_own_ends_stay(build):
    env = build(lambda: make(limit=100.0), [{"turn": 0.3, "length": 3}, {"length": 3}])
    data = env.rollout(9)["next"]
    assert data["done"].shape[-2] == 3
    assert data["truncated"].reshape(-1, 3)[:, -1].all()
    assert not data["terminated"].any()


@settings(max_examples=30, deadline=None)
@given(st.floats(-10, 10, allow_nan=False), st.floats(0.1, 5))
def test_the_limit_belongs_to_the_unflipped_and_nan_has_flipped(angle, limit):
    stop = FlipTermination(Angle(-1), limit).stop
    obs = torch.tensor([[0.0, angle], [0.0, limit], [0.0, -limit]], dtype=torch.float64)
    result = stop(TensorDict({"observation": obs}, [3]))
    assert result.tolist() == [abs(angle) > limit, False, False]
    assert stop(TensorDict({"observation": torch.tensor([math.nan])}, [])).item()


def test_the_key_can_be_renamed(build):
    env = build(
        lambda: FlipTermination(Angle(0), 11.5, key="achieved_goal"), [{"length": 9}, {"length": 9}]
    )
    assert env.rollout(9).shape[-1] == 2  # the achieved goal is 10 plus the step


def test_of_a_batch_those_that_flipped_are_reset_alone():
    env = make_batched("HalfCheetah-v5", 3, seed=0)
    env.append_transform(FlipTermination(Angle(1), 0.1))
    check_env_specs(env, seed=None)
    data = env.rollout(60, break_when_any_done=False)
    beyond = data["next", "observation"][..., 1:2].abs() > 0.1
    assert beyond.any()
    assert torch.equal(data["next", "done"], beyond)
    after = data["observation"][:, 1:][beyond[:, :-1].squeeze(-1)]
    assert (after[..., 1].abs() <= 0.1 + 1e-6).all()  # those and only those were reset


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 0.1))
def test_the_tilt_of_a_quaternion_is_that_of_its_rotated_axis(quaternion):
    w, x, y, z = np.array(quaternion) / np.linalg.norm(quaternion)
    # The last column of the rotation matrix: where the z axis goes.
    axis = np.array([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)])
    expected = math.acos(np.clip(axis[2], -1, 1))
    # Scaled and at an offset: the tilt does not need unit length.
    obs = torch.tensor([9.0, *(3.0 * q for q in quaternion), 9.0], dtype=torch.float64)
    assert QuaternionTilt(1)(obs).item() == pytest.approx(expected, abs=1e-6)


def test_what_does_not_fit_the_observation_is_named(build):
    walks = [{"length": 3}, {"length": 5}]
    with pytest.raises(KeyError, match=r"FlipTermination reads 'other'.*key="):
        build(lambda: FlipTermination(Angle(0), key="other"), walks).rollout(2)
    with pytest.raises(ValueError, match="tilt gave shape"):
        build(lambda: FlipTermination(lambda observation: observation[..., :1]), walks).rollout(2)


def test_a_quaternion_does_not_begin_at_the_end():
    with pytest.raises(ValueError, match="first must be at least 0"):
        QuaternionTilt(-4)


def test_a_quaternions_tilt_is_mujocos():
    env = TASKS["Ant-v5"].make_gym()
    env.reset(seed=0)
    ant = env.unwrapped
    rng = np.random.default_rng(0)
    for _ in range(5):
        qpos = ant.init_qpos.copy()
        quaternion = rng.standard_normal(4)
        qpos[3:7] = quaternion / np.linalg.norm(quaternion)
        ant.set_state(qpos, ant.init_qvel)
        up = ant.data.body("torso").xmat[8]
        observed = torch.as_tensor(ant._get_obs())
        assert math.cos(QuaternionTilt(1)(observed)) == pytest.approx(up, abs=1e-9)
        flipped = FlipTermination(QuaternionTilt(1)).stop(TensorDict({"observation": observed}, []))
        assert flipped.item() == (up < 0)
    env.close()


def test_it_can_be_sent_to_workers():
    stop = pickle.loads(pickle.dumps(FlipTermination(QuaternionTilt(1), 0.5))).stop
    assert stop == FlipTermination(QuaternionTilt(1), 0.5).stop


def test_observations_that_do_not_fit_are_named():
    for tilt in (Angle(2), Angle(-3), QuaternionTilt(0)):
        with pytest.raises(ValueError, match=rf"{type(tilt).__name__}\(.*reads .* 2 values"):
            tilt(torch.zeros(5, 2))
    assert Angle(-2)(torch.tensor([3.0, 4.0])) == 3.0
    assert QuaternionTilt(0)(torch.tensor([0.0, 0.0, 2.0, 0.0])) == pytest.approx(math.pi)
    stop = FlipTermination(Angle(1)).stop
    agents = TensorDict({"observation": torch.zeros(5, 3, 2)}, [5])
    with pytest.raises(ValueError, match=r"of shape \(5, 3, 2\), expected \[5, obs\]"):
        stop(agents)
