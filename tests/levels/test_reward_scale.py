"""The unit of rewards of a level without a model, against the definition."""

from __future__ import annotations

import warnings

import pytest
import torch

from layeredrl_torchrl.levels._reward_scale import RewardScale

NO = torch.zeros(500, 1, dtype=torch.bool)


def observed(reward, ended=NO):
    """Two batches of them, one after the other."""
    scale = RewardScale()
    for rows in (slice(0, 100), slice(100, None)):
        scale.observe(reward[rows], ended[rows])
    return scale(reward)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e5])
@pytest.mark.parametrize("offset", [0.0, -3.0, 30.0, -1e3])
def test_an_offset_is_subtracted_where_it_is_large(unit, offset):
    varying = torch.randn(500, 1, dtype=torch.float64)
    found = observed(unit * (offset + varying))
    expected = varying - varying.mean() if abs(offset) > 20 else offset + varying
    expected = expected / expected.square().mean().sqrt()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("ratio", "share"), [(4.0, 0.0), (8.0, 0.2), (12.5, 0.5), (21.0, 1.0)])
def test_between_5_and_20_times_the_spread_part_of_an_offset_is_subtracted(ratio, share):
    varying = torch.randn(500, 1, dtype=torch.float64)
    reward = ratio + (varying - varying.mean()) / varying.std(correction=0)
    rest = reward - share * ratio
    expected = rest / rest.square().mean().sqrt()
    torch.testing.assert_close(observed(reward), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("why", ["an end", "a reward of 0", "no spread"])
def test_an_offset_that_counts_is_kept(why):
    reward = 1e3 + torch.randn(500, 1, dtype=torch.float64) * (why != "no spread")
    ended = NO.clone()
    if why == "an end":
        ended[123] = True
    elif why == "a reward of 0":
        reward[123] = 0.0
    rest = reward[reward != 0]
    expected = reward / rest.square().mean().sqrt()
    torch.testing.assert_close(observed(reward, ended), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_without_any_reward_there_is_no_unit(batches):
    scale = RewardScale()
    for _ in range(batches):
        scale.observe(torch.zeros(5, 1), NO[:5])
    reward = torch.tensor([[0.0], [-2.5]])
    assert torch.equal(scale(reward), reward)


@pytest.mark.parametrize("zeros", [False, True])
def test_a_broken_reading_is_named_and_a_sparse_reward_is_not(zeros):
    ended = torch.zeros(3000, 1, dtype=torch.bool)
    reward = torch.randn(3000, 1)
    if zeros:
        reward[torch.rand(3000, 1) < 0.5] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RewardScale().observe(reward, ended)
        RewardScale().observe((torch.arange(3000.0) == 77).unsqueeze(-1), ended)
        RewardScale().observe(1.0 + 50.0 * (torch.arange(3000.0) == 77).unsqueeze(-1), ended)
    reward[77] = -1e5
    with pytest.warns(UserWarning, match=r"reward: a few of \d+ rows .* \(up to -1e\+05\)"):
        RewardScale().observe(reward, ended)
