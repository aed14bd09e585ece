"""The families of distributions: samples, fits and memories against plain arithmetic."""

from __future__ import annotations

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrl.data import Bounded, Categorical, OneHot, Unbounded

from layeredrl_torchrl.optimizers import CategoricalSearch, GaussianSearch, make_search


@settings(max_examples=50, deadline=None)
@given(
    bounds=st.lists(
        st.tuples(st.floats(-50, 50, width=32), st.floats(0, 30, width=32)), min_size=1, max_size=4
    ),
    scale=st.floats(0.01, 1e6),
    seed=st.integers(0, 1000),
)
def test_samples_never_leave_the_bounds(bounds, scale, seed):
    low = torch.tensor([start for start, _ in bounds])
    high = low + torch.tensor([size for _, size in bounds])
    generator = torch.Generator().manual_seed(seed)
    mean, std = (scale * torch.randn(2, 3, len(bounds), generator=generator) for _ in range(2))
    search = GaussianSearch(low, high)
    noise = torch.randn(2, 9, 3, len(bounds), generator=generator)
    samples = search.sample((mean, std.abs()), noise)
    for x in (samples, search.mode((mean, std)), search.remember((mean, std))["mean"]):
        assert (x >= low).all()
        assert (x <= high).all()


def test_a_search_keeps_its_own_bounds():
    """What becomes of the tensors that it was built from does not matter, nor they to it."""
    low, high, sigma = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 4.0]), torch.tensor([0.1, 0.2])
    search = GaussianSearch(low, high, sigma)
    same = GaussianSearch(low, high)
    for tensor in (low, high, sigma):
        tensor.fill_(9.0)
    noise = torch.randn(1, 50, 3, 2)
    for one, spread in ((search, [0.1, 0.2]), (same, [0.5, 1.0])):
        parameters = one.start({"mean": torch.zeros(1, 3, 2)}, torch.tensor([False]))
        expected = torch.tensor([0.0, 2.0]) + torch.tensor(spread) * noise
        expected = torch.stack(
            [expected[..., 0].clamp(-1.0, 1.0), expected[..., 1].clamp(0.0, 4.0)], -1
        )
        torch.testing.assert_close(one.sample(parameters, noise), expected)


def test_the_gaussian_fit_is_the_weighted_mean_and_std(make_gaussian):
    candidates = torch.randn(2, 6, 3, 2, dtype=torch.float64)
    weights = torch.rand(2, 6).softmax(1)
    mean, std = make_gaussian(dtype=torch.float64).fit(candidates, weights)
    for b in range(2):
        w, x = weights[b].double().numpy(), candidates[b].numpy()
        expected = np.average(x, axis=0, weights=w)
        spread = np.sqrt(np.average((x - expected) ** 2, axis=0, weights=w))
        np.testing.assert_allclose(mean[b], expected, rtol=1e-6)
        np.testing.assert_allclose(std[b], spread, rtol=1e-6)


@pytest.mark.parametrize(
    ("sigma", "expected"), [(None, [0.5, 1.0]), (0.3, [0.3, 0.3]), ([0.1, 0.2], [0.1, 0.2])]
)
def test_a_search_starts_from_the_memory_or_the_middle_and_always_from_sigma(sigma, expected):
    search = GaussianSearch(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 4.0]), sigma)
    memory = {"mean": torch.tensor([[[0.5, 9.0]], [[torch.nan, torch.inf]]])}
    mean, std = search.start(memory, torch.tensor([True, False]))
    assert mean.tolist() == [[[0.5, 4.0]], [[0.0, 2.0]]]
    torch.testing.assert_close(std, torch.tensor(expected).expand(2, 1, 2))


def test_choices_are_the_quantiles_of_the_noise():
    """The normal quantiles of 0.2 and 0.7 are -0.8416 and 0.5244; what cannot be never is."""
    probs = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0]).expand(1, 1, 6)
    noise = torch.tensor([-4.0, -0.85, -0.83, 0.52, 0.53, 9.0]).view(1, 6, 1)
    assert CategoricalSearch(6).sample((probs,), noise).flatten().tolist() == [1, 1, 3, 3, 4, 4]


def test_the_categorical_fit_is_the_weighted_count():
    candidates = torch.tensor([[[0, 2], [1, 2], [0, 1]]])
    (probs,) = CategoricalSearch(3).fit(candidates, torch.tensor([[0.5, 0.3, 0.2]]))
    expected = torch.tensor([[[0.7, 0.3, 0.0], [0.0, 0.2, 0.8]]])
    torch.testing.assert_close(probs, expected)
    assert CategoricalSearch(3).mode((probs,)).tolist() == [[0, 2]]


def test_choices_that_there_are_not_become_the_nearest():
    search = CategoricalSearch(3)
    assert search.project(torch.tensor([-2, -1, 0, 1, 2, 3, 9])).tolist() == [0, 0, 0, 1, 2, 2, 2]
    assert CategoricalSearch(1).project(torch.tensor([-1, 0, 1])).tolist() == [0, 0, 0]


@pytest.mark.parametrize("uniform", [None, 0.1, 0.5, 1.0])
def test_remembered_probabilities_are_mixed_with_uniform_ones(uniform):
    memory = {"probs": torch.tensor([[[1.0, 0.0]], [[torch.nan, torch.nan]]])}
    search = CategoricalSearch(2) if uniform is None else CategoricalSearch(2, uniform)
    uniform = 0.5 if uniform is None else uniform
    (probs,) = search.start(memory, torch.tensor([True, False]))
    expected = torch.tensor([[[1 - uniform / 2, uniform / 2]], [[0.5, 0.5]]])
    torch.testing.assert_close(probs, expected)


@pytest.mark.parametrize(
    ("space", "kind"),
    [
        (Bounded(-1, 2, (3,)), GaussianSearch),
        (gym.spaces.Box(-1, 2, (3,), dtype=np.float64), GaussianSearch),
        (OneHot(3), CategoricalSearch),
        (Categorical(3), CategoricalSearch),
        (gym.spaces.Discrete(3), CategoricalSearch),
    ],
)
def test_every_space_gets_its_search(space, kind):
    search = make_search(space)
    assert type(search) is kind
    if kind is GaussianSearch:
        assert search.event_shape == (3,)
        assert search.low.tolist() == [-1] * 3
        assert search.high.tolist() == [2] * 3
    else:
        assert search.event_shape == ()
        assert search.n == 3


@pytest.mark.parametrize(
    ("space", "sigma", "error", "match"),
    [
        (Unbounded((2,)), None, ValueError, "bounds"),
        (gym.spaces.Box(-math.inf, math.inf, (2,)), None, ValueError, "bounds"),
        (Bounded(torch.tensor([-1.0, -torch.inf]), torch.ones(2)), None, ValueError, r"\[1\]"),
        (Bounded(-3.4e38, 3.4e38, (2,)), None, ValueError, r"\[0, 1\] are too far apart"),
        (Bounded(0.0, 1e30, (2,)), 1.0, ValueError, "too far apart.*really taken"),
        (Bounded(-1, 1, (2,)), 0.0, ValueError, "sigma"),
        (Bounded(-1, 1, (2,)), math.nan, ValueError, "sigma"),
        (Bounded(-1, 1, (2,)), [0.1, 0.2, 0.3], ValueError, "sigma"),
        (Bounded(-1, 1, (2, 2)), None, ValueError, "one axis"),
        (Categorical(3), 0.5, ValueError, "sigma"),
        (gym.spaces.MultiBinary(3), None, TypeError, "Box"),
    ],
)
def test_spaces_that_cannot_be_searched_are_refused(space, sigma, error, match):
    with pytest.raises(error, match=match):
        make_search(space, sigma)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GaussianSearch(torch.ones(2), torch.tensor([2.0, 0.5])), "exceeds"),
        (lambda: GaussianSearch(torch.ones(2), torch.ones(3)), "shape"),
        (lambda: CategoricalSearch(0), "n must be"),
        (lambda: CategoricalSearch(2, uniform=0.0), "uniform"),
        (lambda: CategoricalSearch(2, uniform=1.1), "uniform"),
    ],
)
def test_crossed_bounds_and_empty_choices_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
