"""Normalizer against means and standard deviations summed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layeredrl_torchrl.nets import Normalizer


def by_hand(data):
    """Mean and population standard deviation of each column, in Python floats."""
    stats = []
    for column in data.double().T.tolist():
        mean = math.fsum(column) / len(column)
        stats.append((mean, math.sqrt(math.fsum((x - mean) ** 2 for x in column) / len(column))))
    return stats


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 8),
    dim=st.integers(1, 3),
    loc=st.floats(-100, 100),
    scale=st.floats(0.1, 100),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_fit_is_the_mean_and_population_std(n, dim, loc, scale, dtype, seed):
    noise = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))
    data = (loc + scale * noise).to(dtype)
    normalizer = Normalizer(dim)
    assert torch.equal(normalizer(data), data)  # until it is fitted
    normalizer.fit(50 * torch.randn(9, dim))  # of which nothing is left
    normalizer.fit(data)
    expected = by_hand(data)
    # rounding of float32 sums of numbers around loc
    atol = 1e-5 * (abs(loc) + scale)
    torch.testing.assert_close(
        normalizer.loc.double(), torch.tensor([m for m, _ in expected]).double(), atol=atol, rtol=0
    )
    torch.testing.assert_close(
        normalizer.scale.double(),
        torch.tensor([s for _, s in expected]).double(),
        atol=atol,
        rtol=1e-4,
    )
    torch.testing.assert_close(normalizer(data), (data - normalizer.loc) / normalizer.scale)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.3, 1e6, 1e-6])
def test_a_constant_feature_is_centred_and_not_blown_up(value):
    data = torch.stack((torch.full((1000,), value), torch.randn(1000)), dim=-1)
    normalizer = Normalizer(2)
    normalizer.fit(data)
    assert normalizer.scale[0] == 1
    assert normalizer(data)[:, 0].abs().max() <= 1e-6 * max(abs(value), 1e-6)
    assert normalizer.scale[1] == pytest.approx(by_hand(data)[1][1], rel=1e-4)


@pytest.mark.parametrize("offset", [1e5, 1e7, 1e9])
def test_in_float64_what_varies_far_from_0_is_no_constant(offset):
    data = offset + torch.rand(1000, 2, dtype=torch.float64)
    data[:, 1] = offset
    normalizer = Normalizer(2).double()
    normalizer.fit(data)
    (_, std), _ = by_hand(data)
    assert normalizer.scale.tolist() == [pytest.approx(std, rel=1e-3), 1.0]
    assert normalizer(data)[:, 0].std() == pytest.approx(1.0, rel=1e-2)
    rounded = Normalizer(2)  # float32 cannot tell these apart
    rounded.fit(data.float())
    assert offset == 1e5 or rounded.scale.tolist() == [1.0, 1.0]


def test_one_row_is_a_constant():
    normalizer = Normalizer(2)
    normalizer.fit(torch.tensor([[3.0, -4.0]]))
    assert normalizer.loc.tolist() == [3, -4]
    assert normalizer.scale.tolist() == [1, 1]


@pytest.mark.parametrize("unit", [1e-8, 1e-4, 1.0, 1e4, 1e8])
def test_the_unit_of_a_feature_makes_no_difference(unit):
    data = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    plain, scaled = Normalizer(2), Normalizer(2)
    plain.fit(data)
    scaled.fit(data * unit)
    torch.testing.assert_close(scaled(data * unit), plain(data), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n", [2, 20])
def test_clip_keeps_results_within_the_range_of_the_data(n):
    data = torch.randn(n, 3) * torch.tensor([0.01, 1.0, 300.0]) + torch.tensor([5.0, 0.0, -40.0])
    clipped, plain = Normalizer(3, clip=True), Normalizer(3)
    x = torch.cat((data, data.mean(0) + 1000 * torch.randn(50, 3), data * 1e6))
    assert torch.equal(clipped(x), x)  # nothing is known yet
    clipped.fit(data)
    plain.fit(data)
    assert torch.equal(clipped(data), plain(data))
    low, high = plain(data).min(0).values, plain(data).max(0).values
    margin = 0.1 * (high - low)
    expected = torch.minimum(torch.maximum(plain(x), low - margin), high + margin)
    assert not torch.equal(expected, plain(x))
    torch.testing.assert_close(clipped(x), expected, atol=1e-4, rtol=1e-4)
    # the next fit sets the range anew
    clipped.fit(x)
    plain.fit(x)
    torch.testing.assert_close(clipped(x), plain(x))


def test_a_normalizer_of_no_features_is_allowed():
    normalizer = Normalizer(0)
    normalizer.fit(torch.zeros(5, 0))
    assert normalizer(torch.zeros(3, 0)).shape == (3, 0)


def test_gradients_pass_to_the_input_and_not_to_the_sample():
    normalizer = Normalizer(2)
    sample = torch.randn(10, 2, requires_grad=True)
    normalizer.fit(sample)
    assert not normalizer.loc.requires_grad
    x = torch.randn(4, 2, requires_grad=True)
    normalizer(x).sum().backward()
    torch.testing.assert_close(x.grad, (1 / normalizer.scale).expand(4, 2))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (torch.zeros(0, 3), "at least one|empty"),
        (torch.tensor([[0.0, 1.0, math.nan], [1.0, 2.0, 3.0]]), "finite"),
        (torch.tensor([[0.0, 1.0, math.inf], [1.0, 2.0, 3.0]]), "finite"),
        (torch.randn(5), "expected"),
        (torch.randn(5, 1), "expected"),
        (torch.randn(2, 5, 3), "expected"),
    ],
)
def test_a_sample_without_statistics_or_of_another_shape_changes_nothing(sample, message):
    normalizer = Normalizer(3)
    with pytest.raises(ValueError, match=message):
        normalizer.fit(sample)
    assert normalizer.loc.tolist() == [0, 0, 0]
    assert normalizer.scale.tolist() == [1, 1, 1]
