"""Rewards of a level's own, alone and in a hierarchy."""

from __future__ import annotations

import pytest
import torch
from helpers import SPACES, both, make_transitions
from torchrl.data import Bounded

from layeredrl_torchrl import Hierarchy, RandomLevel, get_task


@both
@pytest.mark.parametrize("shape", [(60,), (3, 20)])
@pytest.mark.parametrize("column", [True, False])
def test_a_reward_of_its_own_counts_without_a_hierarchy_too(make, shape, column):
    def leftwards(data):
        assert data.ndim == 1
        reward = data["action"] - 2 * data["next", "reward"]
        return reward if column else reward.squeeze(-1)

    level = make(*SPACES, reward_func=leftwards, n_initial_random_steps=1000)
    data = make_transitions().reshape(*shape)
    given = data["next", "reward"].clone()
    info = level.learn(data)
    assert torch.equal(data["next", "reward"], given)
    assert info["reward"] == pytest.approx((data["action"] - 2 * given).mean().item(), abs=1e-6)
    stored = level.buffer[:]["next", "reward"]
    assert torch.equal(stored.flatten(), (data["action"] - 2 * given).flatten())
    wrong = make(*SPACES, reward_func=lambda data: data["observation"])
    with pytest.raises(ValueError, match=r"reward_func gave \(60, 2\), expected \(60,\) or"):
        wrong.learn(data)


@both
@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.uint8])
def test_a_reward_of_its_own_may_be_a_flag_or_a_count(make, kind):
    level = make(*SPACES, reward_func=lambda data: (data["action"] > 0).to(kind))
    data = make_transitions()
    expected = (data["action"] > 0).float()
    assert level.learn(data)["reward"] == pytest.approx(expected.mean().item())
    assert torch.equal(level.buffer[:]["next", "reward"], expected)
    broken = make(*SPACES, reward_func=lambda data: data["action"] * torch.nan)
    with pytest.raises(ValueError, match=r"reward.* holds 60 non-finite values"):
        broken.learn(data)
    assert not len(broken.buffer)


def level_with_reward(make, env):
    options = {"env": env, "n_initial_random_steps": 1000}
    return make(**options, reward_func=lambda data: 3 * data["next", "reward"] + 1)


def last_rewards(level, n):
    return level.buffer[:]["next", "reward"][-n:]


@both
@pytest.mark.parametrize("built", [True, False])
def test_a_level_that_was_in_a_hierarchy_is_paid_by_its_own_reward_alone(make, built):
    env = get_task("InvertedPendulum-v5").make(seed=0)
    level = level_with_reward(make, env)
    if built:
        Hierarchy([level], env)
    else:
        below = RandomLevel(input_spec=Bounded(-1.0, 1.0, (2,)), duration=2)
        with pytest.raises(ValueError, match="set up for the action space"):
            Hierarchy([level, below], env)
    data = env.append_transform(level.make_tensordict_primer()).rollout(4, level)
    given = data["next", "reward"].clone()
    expected = 3 * given + 1
    for _ in range(2):  # nor does it change what it is given
        torch.testing.assert_close(level.own_reward(data), expected)
        assert level.learn(data)["reward"] == pytest.approx(expected.mean().item())
        assert torch.equal(data["next", "reward"], given)
        assert torch.equal(last_rewards(level, len(data)), expected)
    assert torch.equal(level.own_reward(data.lock_()), expected)


@both
def test_what_a_hierarchy_paid_is_not_paid_twice_wherever_it_is_kept(make):
    env = get_task("InvertedPendulum-v5").make(seed=0)
    level = level_with_reward(make, env)
    hierarchy = Hierarchy([level], env)
    data = env.append_transform(hierarchy.make_tensordict_primer()).rollout(4, hierarchy)
    (own,) = hierarchy.transitions(data)
    expected = 3 * data["next", "reward"] + 1
    for rows in (own, own.clone(), own[torch.arange(len(own))]):
        assert "reward" not in level.learn(rows)
        assert torch.equal(last_rewards(level, len(own)), expected)
    assert hierarchy.learn(data)[f"{level.name}/reward"] == pytest.approx(expected.mean().item())
    assert torch.equal(last_rewards(level, len(own)), expected)
