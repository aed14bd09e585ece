"""GaussianMixture on its own: explicit sums, integrals, weights of 0, life as a distribution."""

from __future__ import annotations

import math

import pytest
import torch
from densities import log_density
from hypothesis import given, settings
from hypothesis import strategies as st

from layeredrl_torchrl.models import GaussianMixture

BATCHES = [(), (1,), (4,), (2, 3)]


def make(batch=(), j=3, d=2, *, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    loc = 2 * torch.randn(*batch, j, d, generator=generator, dtype=dtype)
    scale = 0.3 + torch.rand(*batch, j, d, generator=generator, dtype=dtype)
    weights = torch.rand(*batch, j, generator=generator, dtype=dtype)
    return loc, scale, weights / weights.sum(-1, keepdim=True)


@settings(max_examples=50, deadline=None)
@given(
    batch=st.sampled_from(BATCHES),
    j=st.integers(1, 4),
    d=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    far=st.sampled_from([0.0, 3.0, 1000.0]),
    seed=st.integers(0, 2**31),
)
def test_density_moments_and_cdf_are_explicit_sums(batch, j, d, dtype, far, seed):
    loc, scale, weights = make(batch, j, d, dtype=dtype, seed=seed)
    dist = GaussianMixture(loc, scale, weights)
    assert dist.batch_shape == batch
    assert dist.event_shape == (d,)
    x = loc[..., 0, :] + far + torch.randn(*batch, d, dtype=dtype)
    log_prob, cdf, mean, variance = dist.log_prob(x), dist.cdf(x), dist.mean, dist.variance
    assert log_prob.shape == batch
    assert cdf.shape == mean.shape == variance.shape == (*batch, d)
    assert log_prob.dtype == cdf.dtype == mean.dtype == variance.dtype == dtype

    tolerance = {"rel": 1e-4, "abs": 1e-4} if dtype == torch.float32 else {"rel": 1e-9, "abs": 1e-9}
    rows = zip(
        *(v.reshape(-1, *v.shape[len(batch) :]).tolist() for v in (x, loc, scale, weights)),
        strict=True,
    )
    for i, (value, mu, sigma, w) in enumerate(rows):
        got = log_prob.reshape(-1)[i].item()
        assert got == pytest.approx(log_density(value, zip(w, mu, sigma, strict=True)), **tolerance)
        for k in range(d):
            first = sum(w[c] * mu[c][k] for c in range(j))
            # law of total variance: E[var] + var[mean]
            total = sum(w[c] * (sigma[c][k] ** 2 + (mu[c][k] - first) ** 2) for c in range(j))
            below = sum(
                w[c] * 0.5 * (1 + math.erf((value[k] - mu[c][k]) / (sigma[c][k] * math.sqrt(2))))
                for c in range(j)
            )
            assert mean.reshape(-1, d)[i, k].item() == pytest.approx(first, **tolerance)
            assert variance.reshape(-1, d)[i, k].item() == pytest.approx(total, **tolerance)
            assert cdf.reshape(-1, d)[i, k].item() == pytest.approx(below, **tolerance)


@pytest.mark.parametrize("batch", BATCHES)
def test_samples_have_the_moments_and_the_cdf_of_the_distribution(batch):
    torch.manual_seed(0)
    dist = GaussianMixture(*make(batch, dtype=torch.float32))
    samples = dist.sample((20_000,))
    assert samples.shape == (20_000, *batch, 2)
    error = 5 * (dist.variance / 20_000).sqrt()
    assert ((samples.mean(0) - dist.mean).abs() < error).all()
    assert ((samples.var(0) / dist.variance - 1).abs() < 0.1).all()
    # the cdf of samples is uniform, in each dimension
    uniform = dist.cdf(samples).sort(0).values
    expected = ((torch.arange(20_000) + 0.5) / 20_000).reshape(-1, *[1] * (len(batch) + 1))
    assert ((uniform - expected).abs() < 0.02).all()
    # one component for all dimensions of a sample: their product is not that of the means
    loc, weights = dist.modes.loc, dist.mixture_distribution.probs
    product, products = (weights * loc.prod(-1)).sum(-1), samples.prod(-1)
    error = 5 * (products.var(0) / 20_000).sqrt()
    assert ((products.mean(0) - product).abs() < error).all()


# -- weights of 0, and far away ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_of_0_means_that_the_component_is_not_there(dtype):
    """Also where the value lies on the dead component and far from all others."""
    loc = torch.tensor([[0.0, 0.0], [1000.0, 1000.0]], dtype=dtype)
    dist = GaussianMixture(
        loc, torch.ones(2, 2, dtype=dtype), torch.tensor([1.0, 0.0], dtype=dtype)
    )
    alone = GaussianMixture(loc[:1], torch.ones(1, 2, dtype=dtype), torch.ones(1, dtype=dtype))
    for x in (0.0, 3.0, 500.0, 999.0, 1000.0, 1001.0):
        value = torch.full((2,), x, dtype=dtype)
        expected = -(x**2) - math.log(2 * math.pi)
        assert dist.log_prob(value).item() == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(dist.cdf(value), alone.cdf(value))
    torch.testing.assert_close(dist.mean, alone.mean)
    torch.testing.assert_close(dist.variance, alone.variance)
    assert dist.sample((2000,)).abs().max() < 10


@pytest.mark.parametrize("tiny", [1e-10, 1e-30, 1e-37])
def test_weights_near_0_count_as_what_they_are(tiny):
    loc = torch.tensor([[0.0], [100.0]])
    dist = GaussianMixture(loc, torch.ones(2, 1), torch.tensor([1.0, tiny]))
    expected = math.log(tiny) - 0.5 * math.log(2 * math.pi)
    assert dist.log_prob(torch.tensor([100.0])).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("distance", [10.0, 1414.2136, 1e5, 1e9])
@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.0, 0.0], [1e-30, 1.0]])
def test_far_away_float32_agrees_with_float64(distance, weights):
    """-1e6 and far below: finite, and equal to float64 up to rounding."""
    loc, scale = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [1.1]])
    x, w = torch.tensor([distance]), torch.tensor(weights)
    single = GaussianMixture(loc, scale, w).log_prob(x)
    double = GaussianMixture(loc.double(), scale.double(), w.double()).log_prob(x.double())
    expected = log_density([distance], zip(weights, loc.tolist(), scale.tolist(), strict=True))
    assert torch.isfinite(single)
    assert single.item() == pytest.approx(expected, rel=1e-5)
    assert double.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("distance", [0.0, 3.0, 1414.0])
@pytest.mark.parametrize("weights", [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
def test_gradients_stay_finite_with_weights_of_0_and_far_away(distance, weights):
    loc = torch.tensor([[0.0], [1.0]], requires_grad=True)
    scale = torch.tensor([[1.0], [2.0]], requires_grad=True)
    w = torch.tensor(weights, requires_grad=True)
    GaussianMixture(loc, scale, w).log_prob(torch.tensor([distance])).backward()
    for parameter in (loc, scale, w):
        assert torch.isfinite(parameter.grad).all()
    assert loc.grad.abs().sum() > 0 or distance == 0


def test_gradients_agree_with_finite_differences():
    loc, scale, weights = (x.requires_grad_() for x in make((2,)))
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)

    def density(loc, scale, weights, x):
        # normalised inside, so that a finite difference of one weight is allowed
        dist = GaussianMixture(loc, scale, weights / weights.sum(-1, keepdim=True))
        return dist.log_prob(x), dist.cdf(x), dist.mean, dist.variance

    assert torch.autograd.gradcheck(density, (loc, scale, weights, x))


def test_expand_repeats_it_over_a_batch():
    dist = GaussianMixture(*make((3,)))
    wide = dist.expand((4, 3))
    assert wide.batch_shape == (4, 3)
    assert wide.event_shape == (2,)
    x = torch.randn(4, 3, 2, dtype=torch.float64)
    assert dist.log_prob(x).shape == (4, 3)
    torch.testing.assert_close(wide.log_prob(x), dist.log_prob(x))
    torch.testing.assert_close(wide.cdf(x), dist.cdf(x))
    assert wide.sample((7,)).shape == (7, 4, 3, 2)
