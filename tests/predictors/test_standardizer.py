"""Whitening in closed form, and the log-density of standardised changes."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import learn, make_buffer, make_predictor, make_transitions, unchanged
from hypothesis import given, settings
from hypothesis import strategies as st

from layeredrl_torchrl import EncoderNet
from layeredrl_torchrl.predictors import DeltaStandardizer


def correlated(dim, n=500, seed=0, units=1.0):
    """Changes of ``dim`` dimensions that are mixed well enough to be unmixed."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    mix = turn * torch.linspace(0.5, 2.0, dim)
    noise = torch.randn(n, dim, generator=generator)
    return (noise @ mix.mT + torch.randn(dim, generator=generator)) * units


def fitted(delta, **options):
    standardizer = DeltaStandardizer(delta.shape[1], **options)
    standardizer.fit(delta)
    return standardizer


def whitening_error(whitening, covariance):
    """Largest entry of ``W C W^T - I``."""
    whitening, covariance = whitening.double(), covariance.double()
    return (whitening @ covariance @ whitening.mT - torch.eye(len(covariance))).abs().max().item()


# -- the map ------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(dim=st.integers(1, 12), seed=st.integers(0, 100), magnitude=st.integers(-4, 4))
def test_what_comes_out_is_uncorrelated_with_unit_variance(dim, seed, magnitude):
    delta = correlated(dim, seed=seed, units=10.0**magnitude)
    standardizer = fitted(delta, min_eigenvalue=1e-8)
    covariance = torch.cov(delta.double().mT, correction=0).view(dim, dim)
    assert whitening_error(standardizer.whitening, covariance) < 1e-3
    out = standardizer(delta)
    torch.testing.assert_close(out.mean(0), torch.zeros(dim), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        torch.cov(out.mT, correction=0).view(dim, dim), torch.eye(dim), atol=1e-3, rtol=0
    )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 100), magnitudes=st.lists(st.integers(-5, 5), min_size=4, max_size=4))
def test_it_depends_neither_on_units_nor_on_the_order_of_dimensions(seed, magnitudes):
    delta = correlated(4, seed=seed)
    out = fitted(delta)(delta)
    units = 10.0 ** torch.tensor(magnitudes, dtype=torch.float32)
    torch.testing.assert_close(fitted(delta * units)(delta * units), out, atol=1e-3, rtol=1e-3)
    order = torch.randperm(4)
    torch.testing.assert_close(
        fitted(delta[:, order])(delta[:, order]), out[:, order], atol=1e-3, rtol=1e-3
    )


def test_two_dimensions_are_whitened_by_the_known_inverse_root():
    """Correlation r: the inverse root of [[1, r], [r, 1]] is known."""
    r, n = 0.6, 4
    a = torch.tensor([1.0, -1.0, 1.0, -1.0])
    b = torch.tensor([1.0, 1.0, -1.0, -1.0])
    delta = torch.stack([3.0 * a, 0.1 * (r * a + math.sqrt(1 - r * r) * b)], -1) + 7.0
    assert delta.shape == (n, 2)
    p, q = 1 / math.sqrt(1 + r), 1 / math.sqrt(1 - r)
    root = torch.tensor([[(p + q) / 2, (p - q) / 2], [(p - q) / 2, (p + q) / 2]])
    standardizer = fitted(delta)
    torch.testing.assert_close(standardizer.loc, torch.tensor([7.0, 7.0]))
    torch.testing.assert_close(
        standardizer.whitening, root / torch.tensor([3.0, 0.1]), atol=1e-4, rtol=1e-4
    )


def test_a_dimension_that_does_not_change_keeps_its_unit():
    delta = correlated(3)
    delta[:, 1] = 2.0
    standardizer = fitted(delta)
    expected = torch.tensor([0.0, 1.0, 0.0])
    torch.testing.assert_close(standardizer.whitening[1], expected)
    torch.testing.assert_close(standardizer.whitening[:, 1], expected)
    assert standardizer(torch.tensor([0.0, 5.0, 0.0]))[1].item() == pytest.approx(3.0)


def test_one_row_is_a_sample_without_change():
    standardizer = fitted(torch.tensor([[3.0, -4.0]]))
    assert torch.equal(standardizer.whitening, torch.eye(2))
    assert standardizer.loc.tolist() == [3.0, -4.0]


@pytest.mark.parametrize("floor", [1e-2, 1e-4])
def test_a_direction_without_data_is_not_blown_up(floor):
    """Two dimensions that are copies of each other: their difference never varies."""
    delta = correlated(2)
    delta[:, 1] = delta[:, 0]
    standardizer = fitted(delta, min_eigenvalue=floor)
    std = delta[:, 0].std(correction=0)
    off = standardizer.whitening @ (torch.tensor([1.0, -1.0]) * std / math.sqrt(2))
    assert off.norm().item() == pytest.approx(1 / math.sqrt(floor), rel=1e-3)
    along = standardizer.whitening @ (torch.tensor([1.0, 1.0]) * std / math.sqrt(2))
    assert along.norm().item() == pytest.approx(1 / math.sqrt(2), rel=1e-3)


def test_bad_arguments_change_nothing():
    standardizer = fitted(correlated(3))
    for sample in (
        torch.randn(5),
        torch.randn(5, 2),
        torch.randn(0, 3),
        torch.full((4, 3), math.nan),
    ):
        with unchanged(standardizer), pytest.raises(ValueError, match=r"sample|delta"):
            standardizer.fit(sample)
    with pytest.raises(ValueError, match=r"^dim must be at least 1"):
        DeltaStandardizer(0)
    with pytest.raises(ValueError, match="min_eigenvalue"):
        DeltaStandardizer(2, min_eigenvalue=0.0)
    with pytest.raises(ValueError, match="delta"):
        DeltaStandardizer(2)(torch.randn(4, 3))


# -- in a predictor -----------------------------------------------------------------------------


@pytest.fixture
def predictor():
    """Two members of two modes; a state and a context."""
    encoder = EncoderNet((3,), latent_state_dim=2, context_dim=1)
    encoder.mask[:2] = True
    return make_predictor(encoder, context_dim=1, model={"n_modes": 2})


@pytest.fixture
def transitions():
    data = make_transitions(obs_dim=3)
    data["observation"][:, 2] = data["next", "observation"][:, 2] = 1.0
    return data


@pytest.mark.parametrize("options", [{}, {"std": 0.3}, {"std": torch.tensor([0.5, 2.0])}])
def test_it_is_the_density_of_the_standardised_change(predictor, transitions, options):
    learn(predictor, make_buffer(transitions))
    obs, act = transitions["observation"][:6], transitions["action"][:6]
    next_obs = transitions["next", "observation"][:6]
    shape = (2, 3)
    log_prob, term_prob, info = predictor.get_standardized_log_prob(
        *(x.reshape(*shape, -1) for x in (obs, act, next_obs)), **options
    )
    assert log_prob.shape == term_prob.shape == shape
    assert info["means"].shape == (*shape, 2, 2)

    with torch.no_grad():
        (state, _), (next_state, _) = predictor.encode(obs), predictor.encode(next_obs)
        mean, weights, _, _, term = predictor.predict(obs, act)
        standardize = predictor.delta_standardizer
        spread = torch.as_tensor(options.get("std", 1.0)).expand(2)
        for i in range(6):
            change, density = standardize(next_state[i] - state[i]), 0.0
            for m in range(2):
                for k in range(2):
                    predicted = standardize(mean[i, m, k] - state[i])
                    normal = torch.distributions.Normal(predicted, spread)
                    p = normal.log_prob(change).sum().exp().item()
                    density += weights[i, m, k].item() / 2 * p
            assert log_prob.flatten()[i].exp().item() == pytest.approx(density, rel=1e-3)
        torch.testing.assert_close(term_prob.flatten(), term)


def test_learning_standardises_the_changes_of_the_state(predictor):
    data = make_transitions(4000, obs_dim=3)
    data["observation"][:, 1] += 3.0 * data["observation"][:, 0]
    data["next", "observation"][:, 1] += 3.0 * data["next", "observation"][:, 0]
    for key in ("observation", ("next", "observation")):
        data[key][:, 2] = 1.0
    buffer = make_buffer(data, capacity=4000)
    learn(predictor, buffer, n_updates=1)
    state, _ = predictor.encode(data["observation"])
    next_state, _ = predictor.encode(data["next", "observation"])
    out = predictor.delta_standardizer(next_state - state).detach()
    # The statistics are from a random sample of it, and the encoder took one step since.
    torch.testing.assert_close(torch.cov(out.mT), torch.eye(2), atol=0.1, rtol=0)
    torch.testing.assert_close(out.mean(0), torch.zeros(2), atol=0.1, rtol=0)


def test_a_predictor_may_do_without():
    """LayeredRL's crashes in learning."""
    runs = []
    for kept in (True, False):
        torch.manual_seed(0)
        predictor = make_predictor(delta_standardizer=kept)
        runs.append((learn(predictor, make_buffer()), predictor.state_dict().keys()))
    (first, with_it), (second, without) = runs
    assert first == second
    assert with_it - without == {"delta_standardizer.loc", "delta_standardizer.whitening"}
    obs = torch.randn(5, 2)
    with pytest.raises(ValueError, match="delta_standardizer=False"):
        predictor.get_standardized_log_prob(obs, torch.zeros(5, 1), obs)
