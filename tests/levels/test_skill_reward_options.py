"""Rewards of skills: which steps are paid, what each option does, and what is refused."""

from __future__ import annotations

import math

import gymnasium as gym
import pytest
import torch
from helpers import known, make_predictor
from skill_parts import BOX, interval, make_linear, make_skills, transitions
from torchrl.data import Unbounded

from layeredrl_torchrl import DADSReward, SPlaTESReward
from layeredrl_torchrl.levels._outcomes import RunningMoments


@pytest.mark.parametrize(
    ("kind", "rows"), [(SPlaTESReward, [2, 5, 8, 11]), (DADSReward, range(12))]
)
def test_whole_skills_or_all_steps_are_paid(kind, rows):
    reward = kind(n_skill_samples=4)
    level = make_skills(reward, make_linear())
    data = transitions()
    torch.manual_seed(2)
    got = level._sampled(data.clone())["next", "reward"]
    expected, rows = torch.zeros(12, 1), list(rows)
    torch.manual_seed(2)
    read = data["parent_observation"], data["input"], data["next", "parent_observation"]
    expected[rows, 0] = level.rate(*(x[rows] for x in read))
    assert torch.equal(got, expected)
    assert bool(expected[rows].any())
    if kind is SPlaTESReward:  # a skill that is cut short has none
        data["next", "input_done"] |= data["n_actions"] == 1
        assert not level._sampled(data[:2])["next", "reward"].any()


def test_rewards_are_computed_anew_when_they_are_sampled():
    predictor, reward = make_linear(), SPlaTESReward()
    level = make_skills(reward, predictor)
    level.buffer.extend(transitions())

    def sample():
        torch.manual_seed(4)
        return level._sampled(level.buffer.sample(64))["next", "reward"]

    first = sample()
    with torch.no_grad():
        for parameter in predictor.model.members.parameters():
            parameter.mul_(-1.0)
    assert not torch.allclose(sample(), first)
    stored = level.buffer.storage[:]["next", "reward"]
    assert torch.equal(stored, torch.full((12, 1), 7.0))


# -- options --------------------------------------------------------------------------------


def rated(reward, level=None, n_env_steps=0, since=None, **options):
    """The reward of twelve rows, with the same skills of the prior each time."""
    level = level or make_skills(reward, make_linear(), **options)
    level.n_env_steps.fill_(n_env_steps)
    data = torch.Generator().manual_seed(5)
    start, end = (torch.randn(12, 2, generator=data) for _ in range(2))
    skill = 2 * torch.rand(12, 2, generator=data) - 1
    torch.manual_seed(1)
    return level.rate(start, skill, end, since)


def sampled(reward, data, **options):
    """What a level makes of ``data``, with the same skills of the prior each time."""
    level = make_skills(reward, make_linear(), **options)
    torch.manual_seed(1)
    return level._sampled(data.clone())["next", "reward"]


def test_what_is_told_can_be_clipped():
    plain = rated(SPlaTESReward())
    assert (plain < -1).any()
    assert (plain > 0.5).any()
    assert torch.equal(rated(SPlaTESReward(clip=(-1.0, 0.5))), plain.clamp(-1.0, 0.5))
    assert torch.equal(rated(SPlaTESReward(clip=(-1.0, math.inf))), plain.clamp(min=-1.0))


def test_an_offset_is_paid_for_every_action():
    data = transitions()
    for kind in (SPlaTESReward, DADSReward):
        plain = sampled(kind(), data)
        torch.testing.assert_close(sampled(kind(offset=0.75), data), plain + 0.75)


def test_std_may_depend_on_the_environment_steps():
    reward = SPlaTESReward(std=lambda n: 2.0 - n / 100, n_symmetry_breaking_steps=300)
    level = make_skills(reward, make_linear())
    for n in (0, 100, 150):
        fixed = SPlaTESReward(std=2.0 - n / 100, n_symmetry_breaking_steps=300)
        other = make_skills(fixed, level.parent_predictor)
        fixed.linear_model.copy_(reward.linear_model)
        torch.testing.assert_close(rated(reward, level, n), rated(fixed, other, n))
    with pytest.raises(ValueError, match=r"std\(n_env_steps\) .* got 0.0"):
        rated(reward, level, 200)


def test_rewards_are_normalized_by_their_own_moments():
    data = transitions(300)
    paid = data["n_actions"] == 2
    plain = sampled(SPlaTESReward(), data)[paid]
    reward = SPlaTESReward(normalize=True, offset=0.5)
    got = sampled(reward, data)
    assert (got[~paid] == 0.5).all()
    expected = (plain - plain.mean()) / plain.std(correction=0)
    torch.testing.assert_close(got[paid] - 0.5, expected, atol=1e-4, rtol=1e-4)
    # Further rewards count as the first did, until there are many; then the old are forgotten.
    moments, values = RunningMoments(), torch.randn(25_000) * 3 + 2
    for part in values[:20_000].split(700):
        moments.observe(part)
    torch.testing.assert_close(moments.mean.float(), values[:20_000].mean())
    for part in values[20_000:].split(100):
        moments.observe(0 * part + 7)
    left = (1 - 100 / 20_100) ** 50
    expected = left * values[:20_000].double().mean() + (1 - left) * 7
    torch.testing.assert_close(moments.mean, expected)
    assert reward.state_dict()["moments.n_seen"] == 100
    assert not SPlaTESReward().state_dict().keys() & {"moments.n_seen"}
    torch.testing.assert_close(RunningMoments()(torch.ones(3)), torch.ones(3))


def test_differences_of_what_is_told_add_up_over_a_skill():
    """To what the outcome tells less what the start does, here in closed form."""
    reward = SPlaTESReward(potential_difference=True, n_skill_samples=40_000)
    level = make_skills(reward, make_linear())
    path = (0.3 * torch.randn(4, 2)).cumsum(0)
    data = transitions(3)
    data["parent_observation"] = path[:1].expand(3, 2)
    data["input"] = data["input"][:1].expand(3, 2).clone()
    data["parent_sees"], data["next", "parent_observation"] = path[:3], path[1:]
    torch.manual_seed(2)
    got = level._sampled(data.clone())["next", "reward"]
    gain, std = torch.tensor([0.7, 0.3]), 0.5
    change = (path - path[0]).double()
    exact = torch.distributions.Normal(gain * data["input"][0], std).log_prob(change)
    told = (exact - interval(change, gain, std)).sum(-1)
    torch.testing.assert_close(got.squeeze(-1), told.diff().float(), atol=0.05, rtol=0.02)
    assert "parent_sees" in level.stored_keys[0]


def test_below_a_known_model_changes_are_in_units_of_the_state():
    moves = lambda state, action: state + 0.7 * action  # noqa: E731
    predictor = known(moves, lambda *_: torch.zeros(()), BOX, width=2)
    skill, start = torch.rand(8, 2).mul(2).sub(1), torch.randn(8, 2)
    end = start + torch.randn(8, 2)
    for dims in ([0, 1], [1]):
        reward = SPlaTESReward(std=0.3, n_skill_samples=40_000, state_dims=dims)
        level = make_skills(reward, predictor)
        exact = torch.distributions.Normal(0.7 * skill, 0.3).log_prob(end - start)
        expected = (exact - interval(end - start, torch.tensor(0.7), 0.3))[:, dims].sum(-1)
        torch.testing.assert_close(level.rate(start, skill, end), expected, atol=0.1, rtol=0.03)
    # And the random linear model spreads skills by one unit.
    reward = SPlaTESReward(std=0.3, n_symmetry_breaking_steps=10, n_skill_samples=40_000)
    level = make_skills(reward, predictor)
    change, gain = (end - start) @ reward.linear_model, torch.tensor(math.sqrt(3.0))
    exact = torch.distributions.Normal(gain * skill, 0.3).log_prob(change)
    expected = (exact - interval(change, gain, 0.3)).sum(-1)
    torch.testing.assert_close(level.rate(start, skill, end), expected, atol=0.15, rtol=0.03)


# -- bad input ------------------------------------------------------------------------------


def test_a_reward_that_does_not_fit_the_predictor_is_refused():
    for options, predictor, error, message in (
        ({"state_dims": [0, 2]}, make_linear(), ValueError, "above has 2 dimensions"),
        ({"std": [1.0, 1.0, 1.0]}, make_linear(), ValueError, "3 stds for 2 dimensions"),
        ({}, make_predictor(delta_standardizer=False), ValueError, "delta_standardizer=False"),
    ):
        with pytest.raises(error, match=message):
            make_skills(SPlaTESReward(**options), predictor)


def test_data_that_no_hierarchy_gave_are_refused():
    level = make_skills(SPlaTESReward(), make_linear())
    level.setup(Unbounded((2,)), BOX)
    for key in ("parent_observation", "n_actions", ("next", "parent_observation")):
        with pytest.raises(KeyError, match=r"is given by a Hierarchy"):
            level.learn(transitions().exclude(key))


@pytest.mark.parametrize("spec", [None, Unbounded((2,)), gym.spaces.Box(0.0, math.inf, (2,))])
def test_skills_need_a_prior(spec):
    with pytest.raises(ValueError, match="prior of skills"):
        make_skills(SPlaTESReward(), input_spec=spec)
