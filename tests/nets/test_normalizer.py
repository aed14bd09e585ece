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


def test_without_fit_it_changes_nothing():
    x = torch.randn(2, 3, 4)
    normalizer = Normalizer(4)
    assert torch.equal(normalizer(x), x)


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


def test_the_fitted_data_has_mean_0_and_std_1():
    data = torch.randn(500, 3) * torch.tensor([0.01, 1.0, 300.0]) + torch.tensor([5.0, 0.0, -40.0])
    normalizer = Normalizer(3)
    normalizer.fit(data)
    for mean, std in by_hand(normalizer(data)):
        assert mean == pytest.approx(0, abs=1e-4)
        assert std == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.3, 1e6, 1e-6])
def test_a_constant_feature_is_centred_and_not_blown_up(value):
    data = torch.stack((torch.full((1000,), value), torch.randn(1000)), dim=-1)
    normalizer = Normalizer(2)
    normalizer.fit(data)
    assert normalizer.scale[0] == 1
    assert normalizer(data)[:, 0].abs().max() <= 1e-6 * max(abs(value), 1e-6)
    assert normalizer.scale[1] == pytest.approx(by_hand(data)[1][1], rel=1e-4)


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


def test_clip_is_saved():
    one, two = Normalizer(2, clip=True), Normalizer(2, clip=True)
    one.fit(torch.randn(9, 2))
    two.load_state_dict(one.state_dict())
    x = 100 * torch.randn(9, 2)
    assert torch.equal(two(x), one(x))
    assert two(x).abs().max() < 10


def test_fit_replaces_what_an_earlier_fit_found():
    once, twice = Normalizer(2), Normalizer(2)
    data = torch.randn(10, 2)
    twice.fit(torch.randn(10, 2) * 50)
    once.fit(data)
    twice.fit(data)
    assert torch.equal(once.loc, twice.loc)
    assert torch.equal(once.scale, twice.scale)


def test_only_fit_changes_the_statistics_and_they_are_saved():
    normalizer = Normalizer(2)
    normalizer.fit(torch.randn(10, 2) * 3 + 1)
    before = {name: value.clone() for name, value in normalizer.state_dict().items()}
    normalizer(torch.randn(100, 2) * 9)
    after = normalizer.state_dict()
    assert set(before) == set(after) == {"loc", "scale"}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not list(normalizer.parameters())


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
    "sample",
    [
        torch.zeros(0, 3),
        torch.tensor([[0.0, 1.0, math.nan], [1.0, 2.0, 3.0]]),
        torch.tensor([[0.0, 1.0, math.inf], [1.0, 2.0, 3.0]]),
    ],
    ids=["empty", "nan", "inf"],
)
def test_a_sample_without_statistics_is_refused_and_changes_nothing(sample):
    normalizer = Normalizer(3)
    with pytest.raises(ValueError, match=r"empty|at least one|finite|NaN"):
        normalizer.fit(sample)
    assert normalizer.loc.tolist() == [0, 0, 0]
    assert normalizer.scale.tolist() == [1, 1, 1]


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 4), (2, 5, 3)])
def test_a_sample_of_another_shape_is_refused_and_changes_nothing(shape):
    normalizer = Normalizer(3)
    with pytest.raises(ValueError, match="expected"):
        normalizer.fit(torch.randn(shape))
    assert normalizer.loc.tolist() == [0, 0, 0]
