"""Rewards on other scales: the numbers, the specs, and in environments and collectors."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import RewardScaling
from torchrl.envs.utils import check_env_specs

from layeredrl_torchrl import AffineReward, LogReward

numbers = st.floats(-50, 50)


def apply(transform, *rewards):
    td = TensorDict({"reward": torch.tensor(rewards)}, [])
    return transform(td)["reward"].tolist()


@settings(max_examples=50, deadline=None)
@given(
    st.booleans(), numbers.filter(lambda x: abs(x) > 1e-2), numbers, numbers, st.floats(1e-3, 10)
)
def test_a_number_is_what_the_formula_says(log, scale, offset, reward, floor):
    if log:
        make, x = partial(LogReward, floor), math.log(max(abs(reward), floor))
    else:
        make, x = AffineReward, reward
    result, nan = apply(make(scale, offset), abs(reward) if log else reward, math.nan)
    assert result == pytest.approx(scale * x + offset, rel=1e-4, abs=1e-3)
    assert math.isnan(nan)


def test_by_default_nothing_is_scaled_or_added():
    assert apply(AffineReward(), 3.0) == [3.0]
    assert apply(LogReward(0.1), 3.0) == pytest.approx([math.log(3.0)])


def test_torchrls_own_transform_cannot_turn_a_cost_around():
    # Why there is an AffineReward: this fails once RewardScaling can.
    assert apply(RewardScaling(0.0, -1.0), 2.0) == pytest.approx([2e-6])
    assert apply(AffineReward(-1.0), 2.0) == [-2.0]


@pytest.mark.parametrize("scale", [2.0, -2.0])
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda scale: AffineReward(scale, 1.0), lambda scale: (1.0, scale * 4.0 + 1.0)),
        (lambda scale: LogReward(0.5, scale), lambda s: (s * math.log(0.5), s * math.log(4.0))),
    ],
    ids=["affine", "log"],
)
def test_bounds_of_the_spec_are_mapped(make, expected, scale):
    spec = make(scale).transform_reward_spec(Composite(reward=Bounded(0.0, 4.0, (2, 1)), shape=[]))
    low, high = sorted(expected(scale))
    torch.testing.assert_close(spec["reward"].space.low, torch.full((2, 1), low))
    torch.testing.assert_close(spec["reward"].space.high, torch.full((2, 1), high))
    spec = AffineReward(scale).transform_reward_spec(Composite(reward=Unbounded((1,)), shape=[]))
    assert spec["reward"] == Unbounded((1,))


@pytest.mark.parametrize("kind", [torch.int64, torch.float64, torch.bool])
def test_rewards_of_other_kinds_fit_their_spec(kind):
    given = Binary(1, (1,), dtype=kind) if kind == torch.bool else Unbounded((1,), dtype=kind)
    for transform in (AffineReward(-0.5), LogReward(0.1)):
        if kind == torch.bool and isinstance(transform, LogReward):
            continue  # a flag has no logarithm
        spec = transform.transform_reward_spec(Composite(reward=given.clone(), shape=[]))["reward"]
        assert spec.is_in(transform(TensorDict(reward=given.one()))["reward"])


@pytest.mark.parametrize(
    ("make", "expected"),
    [(lambda: AffineReward(-2.0, 0.5), -4.5), (lambda: LogReward(0.1, 2.0), 2 * math.log(2.5))],
    ids=["affine", "log"],
)
def test_rewards_are_changed_in_environments_and_collectors(build, make, expected):
    walks = [{"reward": 2.5, "length": 3}, {"reward": 2.5, "length": 5}]
    env = build(make, walks)
    check_env_specs(env)
    data = env.rollout(8, break_when_any_done=False)
    n = data.shape.numel()
    torch.testing.assert_close(data["next", "reward"], torch.full((*data.shape, 1), expected))
    batches = list(Collector(env, None, frames_per_batch=n, total_frames=2 * n))
    assert len(batches) == 2
    for batch in batches:
        torch.testing.assert_close(batch["next", "reward"], torch.full((*batch.shape, 1), expected))


def test_other_keys_keep_the_old_reward(build):
    make = lambda: AffineReward(3.0, out_keys=["scaled"])  # noqa: E731
    env = build(make, [{"reward": 2.0}, {"reward": 2.0}])
    check_env_specs(env)
    data = env.rollout(2)["next"]
    assert (data["reward"] == 2.0).all()
    assert (data["scaled"] == 6.0).all()


def test_the_logarithm_of_a_negative_reward_is_an_error():
    with pytest.raises(ValueError, match=r"got a reward of -0\.5.*shift them first"):
        apply(LogReward(0.1), 1.0, -0.5)


def test_a_floor_below_the_smallest_float16_is_kept():
    found = LogReward(1e-9, 0.5)(TensorDict({"reward": torch.tensor([0.0, 4.0]).half()}, []))
    assert found["reward"].dtype == torch.float16
    assert found["reward"].tolist() == pytest.approx([math.log(1e-9) / 2, math.log(2)], rel=1e-3)


@pytest.mark.parametrize("make", [AffineReward, partial(LogReward, 0.1)])
def test_keys_that_do_not_fit_are_refused(make, build):
    with pytest.raises(TypeError, match="in_keys must be a list of keys, got 'reward'"):
        make(in_keys="reward")
    with pytest.raises(TypeError, match="out_keys must be a list of keys, got 'scaled'"):
        make(out_keys="scaled")
    with pytest.raises(ValueError, match="need as many out_keys"):
        make(out_keys=["one", "two"])
    with pytest.raises(KeyError, match=r"Reward reads 'cost', but .*'reward'.* in_keys="):
        build(lambda: make(in_keys=["cost"]), [{}, {}]).rollout(2)
