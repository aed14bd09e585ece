"""dist and get_log_prob against sums over members, modes and dimensions in Python floats."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from densities import log_density
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from layeredrl_torchrl import Model

BATCHES = [(), (1,), (3,), (2, 2)]


def inputs(batch, d=3, c=2, a=2, *, seed=7):
    """State, context, action, next state."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*batch, n, generator=generator) for n in (d, c, a, d))


def as_td(state, context, action):
    return TensorDict(
        {"state": state, "context": context, "action": action}, batch_size=state.shape[:-1]
    )


def components_of(nets, row, sample, slow_predict):
    """The whole ensemble at one row as (weight, mean, std), from each member on its own."""
    out = []
    for net in nets:
        mean, std, weights, _ = slow_predict(net, *row, sample)
        for m, s, w in zip(mean, std, weights, strict=True):
            out.append((w / len(nets), m, s))
    return out


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(["fc", "tanh"]),
    batch=st.sampled_from(BATCHES),
    n_models=st.integers(1, 3),
    n_modes=st.integers(1, 3),
    d=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_the_ensemble_is_one_equal_mixture_over_its_members(
    kind, batch, n_models, n_modes, d, seed, fc, tanh_net, recorded, transitions, slow_predict
):
    torch.manual_seed(seed)
    ensemble, nets = recorded(
        fc if kind == "fc" else tanh_net, d=d, n_models=n_models, n_modes=n_modes
    )
    sample = transitions(d=d, seed=seed)
    ensemble.fit_statistics(*sample)
    state, context, action, noise = inputs(batch, d, seed=seed)
    next_state = state + noise
    dist = ensemble.dist(as_td(state, context, action))
    assert dist.batch_shape == batch
    assert dist.event_shape == (d,)
    log_prob, term_prob, info = ensemble.get_log_prob(state, context, action, next_state)
    assert log_prob.shape == term_prob.shape == batch
    assert info["means"].shape == (*batch, n_models, d)
    torch.testing.assert_close(dist.log_prob(next_state), log_prob, atol=1e-4, rtol=1e-4)
    assert torch.equal(term_prob, ensemble.predict(state, context, action)[3])
    close = {"rel": 2e-3, "abs": 2e-3}
    for index in itertools.product(*map(range, batch)):
        row = state[index], context[index], action[index]
        parts = components_of(nets, row, sample, slow_predict)
        x = next_state[index].tolist()
        assert log_prob[index].item() == pytest.approx(log_density(x, parts), **close)
        for m in range(n_models):
            of_member = parts[m * n_modes : (m + 1) * n_modes]
            for k in range(d):
                mean = sum(w * n_models * mu[k] for w, mu, _ in of_member)
                assert info["means"][index][m, k].item() == pytest.approx(mean, **close)


# -- a fixed std and a linear transform ----------------------------------------------------


MATRICES = {
    "none": None,
    "narrow": torch.tensor([[1.0, -2.0, 0.5]]),
    "square": torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.5, -1.0]]),
    "tall": torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("as_callable", [False, True])
@pytest.mark.parametrize("std", [0.8, torch.tensor(0.7), "vector"], ids=str)
def test_a_fixed_std_replaces_the_predicted_one_in_the_space_of_the_transform(
    batch, name, as_callable, std, fc, recorded, transitions, slow_predict
):
    matrix = MATRICES[name]
    rows = torch.eye(3) if matrix is None else matrix
    ensemble, nets = recorded(fc)
    sample = transitions()
    ensemble.fit_statistics(*sample)
    state, context, action, noise = inputs(batch)
    next_state = state + noise
    std = 0.5 + torch.rand(len(rows)) if std == "vector" else std
    transform = (lambda x: x @ rows.T) if as_callable else matrix
    given = state, context, action, next_state
    log_prob, _, info = ensemble.get_log_prob(*given, std=std, transform=transform)
    assert log_prob.shape == batch
    assert torch.equal(info["means"], ensemble.get_log_prob(*given)[2]["means"])
    fixed = torch.as_tensor(std).expand(len(rows)).tolist()
    for index in itertools.product(*map(range, batch)):
        row = state[index], context[index], action[index]
        parts = []
        for w, mean, _ in components_of(nets, row, sample, slow_predict):
            parts.append((w, (rows @ torch.tensor(mean)).tolist(), fixed))
        x = (rows @ next_state[index]).tolist()
        assert log_prob[index].item() == pytest.approx(log_density(x, parts), rel=2e-3, abs=2e-3)


# -- far away, and weights of 0 ------------------------------------------------------------


def test_log_probabilities_of_minus_1e6_in_float32(net, recorded):
    ensemble, _ = recorded(net)
    state, context, action, _ = inputs((6,))
    mean, _, std, _ = ensemble.predict(state, context, action)
    # so far from the first mode that its log-density is about -1e6
    far = mean[:, 0, 0] + math.sqrt(2e6 / 3) * std[:, 0, 0]
    with torch.no_grad():
        single = ensemble.get_log_prob(state, context, action, far)[0]
        from_dist = ensemble.dist(as_td(state, context, action)).log_prob(far)
        ensemble.double()
        double = ensemble.get_log_prob(state, context, action, far)[0]
    assert (double < -1e5).all()
    assert (double > -1e8).all()
    assert torch.isfinite(single).all()
    for got in (single, from_dist):
        torch.testing.assert_close(got.double(), double, atol=1, rtol=1e-4)


def test_gradients_are_finite_far_away_and_reach_every_parameter(fc, recorded):
    ensemble, _ = recorded(fc)
    state, context, action, _ = inputs((6,))
    next_state = (state + 2000.0).requires_grad_()
    log_prob, _, _ = ensemble.get_log_prob(state, context, action, next_state)
    log_prob.sum().backward()
    assert (log_prob < -1e5).all()
    assert torch.isfinite(next_state.grad).all()
    assert (next_state.grad != 0).all()
    for parameter in ensemble.members.parameters():
        assert torch.isfinite(parameter.grad).all()
        assert (parameter.grad != 0).any()


def test_gradients_agree_with_finite_differences(fc, recorded, transitions):
    ensemble, _ = recorded(fc, n_models=2)
    ensemble.double().fit_statistics(*(x.double() for x in transitions()))
    given = tuple(x.double().requires_grad_() for x in inputs((2,)))
    assert torch.autograd.gradcheck(lambda *x: ensemble.get_log_prob(*x)[0], given)
    matrix = MATRICES["narrow"].double()
    assert torch.autograd.gradcheck(
        lambda *x: ensemble.get_log_prob(*x, std=0.7, transform=matrix)[0], given
    )


# -- bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"next_state": torch.zeros(4, 2)}, ValueError, r"next_state has shape \(4, 2\), expected"),
        ({"next_state": torch.zeros(5, 3)}, ValueError, r"next_state.*\(5, 3\).*\(4, 3\)"),
        ({"next_state": torch.zeros(3)}, ValueError, r"next_state.*\(3,\).*\(4, 3\)"),
        ({"next_state": torch.zeros(4, 3).long()}, TypeError, "next_state must be a float.*int64"),
        (
            {"next_state": torch.full((4, 3), math.nan)},
            ValueError,
            "next_state holds 12 non-finite",
        ),
        ({"transform": torch.eye(3)}, ValueError, r"transform needs a fixed std.*pass std="),
        ({"std": torch.ones(2)}, ValueError, r"std.*\(2,\)"),
        ({"std": 1.0, "transform": torch.ones(2, 4)}, ValueError, r"transform.*\(2, 4\)"),
        ({"std": torch.ones(3), "transform": torch.ones(2, 3)}, ValueError, r"std.*\(3,\)"),
        ({"std": 0.0}, ValueError, "std must be positive and finite, got"),
        ({"std": math.inf}, ValueError, "std must be positive and finite, got"),
        ({"std": torch.tensor([1.0, -2.0, 1.0])}, ValueError, "std must be positive and finite"),
    ],
)
def test_what_does_not_fit_is_refused(changes, error, message, fc, recorded):
    ensemble, _ = recorded(fc)
    state, context, action, next_state = inputs((4,))
    with pytest.raises(error, match=message):
        ensemble.get_log_prob(state, context, action, **{"next_state": next_state} | changes)


class Noiseless(Model):
    """x' = x + a for sure."""

    def predict_members(self, state, context, action):
        mean = (state + action).unsqueeze(-2)
        ones = torch.ones_like(state[..., 0])
        return (mean, torch.zeros_like(mean)), ones.unsqueeze(-1), 0 * ones


def test_a_model_without_noise_has_no_density_but_takes_a_fixed_std(box):
    model = Noiseless(box(2), None, box(2))
    state, action, next_state = torch.zeros(3, 2), torch.ones(3, 2), torch.full((3, 2), 1.5)
    with pytest.raises(ValueError, match="standard deviation of 0"):
        model.dist(TensorDict({"state": state, "action": action}, batch_size=(3,)))
    for x in (next_state, state + action):
        with pytest.raises(ValueError, match="standard deviation of 0"):
            model.get_log_prob(state, None, action, x)
    log_prob, _, _ = model.get_log_prob(state, None, action, next_state, std=0.5)
    expected = 2 * (-0.5 * 1.0 - math.log(0.5) - 0.5 * math.log(2 * math.pi))
    assert log_prob.tolist() == pytest.approx([expected] * 3, rel=1e-5)
