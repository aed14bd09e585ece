"""Units of inputs and rewards of a level without a model: those of all data it learns from."""

from __future__ import annotations

import pytest
import torch
from helpers import SPACES, make_transitions, model_free_level
from hypothesis import given, settings
from hypothesis import strategies as st
from level_states import assert_same
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ReplayBuffer, TensorDictReplayBuffer
from torchrl.envs import Compose, Transform

from layeredrl_torchrl import AffineReward
from layeredrl_torchrl.transforms import RelabelGoals


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_levels_in_low_precision_are_those_of_the_data(dtype):
    """Of 4,000 rows, rewards up to 10,000: counts and squares beyond what these types hold."""
    exact, cast = model_free_level(*SPACES), model_free_level(*SPACES).to(dtype)
    data = make_transitions(n_steps=4000)
    data["next", "reward"] *= 3000.0
    for level in (exact, cast):
        level.updates_per_step = 1e-5
        for part in data.split(50):
            level.learn(part)
    for part in ("features.mean", "features.square", "reward_scale.square", "updates_due"):
        found, expected = (level.get_buffer(part) for level in (cast, exact))
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)
    given = data["next", "reward"][:9]
    torch.testing.assert_close(
        cast.reward_scale(given), exact.reward_scale(given), rtol=0.01, atol=0.01
    )


def test_a_model_free_level_knows_the_units_of_what_was_stored_before():
    before, data = make_transitions(), make_transitions(20)
    for key in ("observation", ("next", "observation")):
        before[key] += 50.0
    before["next", "reward"] *= 30.0
    stored = model_free_level(*SPACES)
    required, _ = stored.stored_keys
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100))
    buffer.extend(before.select(*required))
    level = model_free_level(*SPACES, buffer=buffer)
    both = torch.cat([before, data])
    for rows in (data[:12], data[12:]):
        level.learn(rows)
    torch.testing.assert_close(level.features.normalizer.loc, both["observation"].mean(0))
    square = both["next", "reward"].double().square().mean()
    torch.testing.assert_close(level.reward_scale.square, square, rtol=1e-5, atol=0)


class Doubled(Transform):
    """Doubles observations in place, and counts the rows that it is given."""

    n_rows = 0

    def forward(self, tensordict):
        self.n_rows += len(tensordict)
        for key in ("observation", ("next", "observation")):
            tensordict[key].mul_(2.0)
        return tensordict


@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage])
@pytest.mark.parametrize("room", [13, 30, 100])
def test_a_model_free_level_knows_the_units_that_the_buffers_transforms_give(storage, room):
    before, data = make_transitions(8), make_transitions(40)
    doubled = Doubled()
    reward = AffineReward(1000.0, 7.0, in_keys=[("next", "reward")])
    buffer = TensorDictReplayBuffer(storage=storage(room), transform=Compose(doubled, reward))
    level = model_free_level(*SPACES, buffer=buffer, n_initial_random_steps=1000)
    required, _ = level.stored_keys
    ReplayBuffer.extend(buffer, before.select(*required))
    first, second = data[:20], data[20:]
    for rows in (first, second):
        level.learn(rows)
    # Those that were written over before they were seen were not learned from either.
    seen = torch.cat([torch.cat([before, first])[-room:], second[-room:]])
    assert doubled.n_rows == len(seen)
    mean = 2.0 * seen["observation"].mean(0)
    torch.testing.assert_close(level.features.normalizer.loc, mean)
    paid = 1000.0 * seen["next", "reward"].double() + 7.0
    torch.testing.assert_close(level.reward_scale.square, paid.square().mean(), rtol=1e-5, atol=0)
    stored = buffer.storage[:]
    for key in ("observation", ("next", "reward")):
        expected = torch.cat([before, data])[-room:][key]
        assert torch.equal(stored[key].sort(0).values, expected.sort(0).values)


def test_the_goals_of_a_hindsight_buffer_are_as_stored_to_the_units():
    reached = lambda achieved, desired: (achieved == desired).float()  # noqa: E731
    hindsight = RelabelGoals(2, achieved=[0], desired=[1], reward_func=reached)
    levels = [
        model_free_level(*SPACES, buffer=own, n_initial_random_steps=1000)
        for own in (None, hindsight.make_buffer(storage=LazyTensorStorage(100)))
    ]
    for data in (make_transitions(), make_transitions(20)):
        for level in levels:
            level.learn(data)
    assert_same(*({**level.features.state_dict()} for level in levels))
    assert_same(*({**level.reward_scale.state_dict()} for level in levels))


@settings(max_examples=10, deadline=None)
@given(power=st.integers(-60, 60), sparse=st.booleans())
def test_the_unit_of_the_reward_does_not_matter(power, sparse):
    """Bit for bit: powers of two are exact."""
    torch.manual_seed(0)
    n = 40
    reward = torch.randn(n, 1) * (torch.rand(n, 1) < (0.1 if sparse else 1.0))
    no = torch.zeros(n, 1, dtype=torch.bool)
    after = {"observation": torch.randn(n, 2), "done": no, "terminated": no}
    now = {"observation": torch.randn(n, 2), "action": 2 * torch.rand(n, 1) - 1}
    learned = []
    for unit in (1.0, 2.0**power):
        torch.manual_seed(1)
        level = model_free_level(*SPACES)
        level.learn(TensorDict({**now, "next": {**after, "reward": reward * unit}}, [n]))
        learned.append(level.learner.state_dict())
    torch.testing.assert_close(*learned, rtol=0, atol=0)
