"""dist and get_log_prob against sums over members, modes and dimensions in Python floats."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from densities import log_density
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


MATRICES = {
    "none": None,
    "narrow": torch.tensor([[1.0, -2.0, 0.5]]),
    "square": torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.5, -1.0]]),
    "tall": torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]),
}
FIXED = [0.8, torch.tensor(0.7), "vector"]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    ("std", "name"), [(None, "none"), *itertools.product(FIXED, MATRICES)], ids=str
)
@pytest.mark.parametrize("as_callable", [False, True])
def test_the_ensemble_is_one_equal_mixture_over_its_members(
    batch, std, name, as_callable, net, recorded, transitions, slow_predict
):
    """A fixed std replaces the predicted one, in the space of the transform."""
    matrix = MATRICES[name]
    rows = torch.eye(3) if matrix is None else matrix
    ensemble, nets = recorded(net)
    sample = transitions()
    ensemble.fit_statistics(*sample)
    state, context, action, noise = inputs(batch)
    given = state, context, action, state + noise
    std = 0.5 + torch.rand(len(rows)) if isinstance(std, str) else std
    options = {"std": std, "transform": (lambda x: x @ rows.T) if as_callable else matrix}
    log_prob, term_prob, info = ensemble.get_log_prob(*given, **options if std is not None else {})
    assert log_prob.shape == batch
    assert torch.equal(term_prob, ensemble.predict(*given[:3])[3])
    if std is None:
        dist = ensemble.dist(as_td(*given[:3]))
        assert dist.batch_shape == batch
        assert dist.event_shape == (3,)
        torch.testing.assert_close(dist.log_prob(given[3]), log_prob, atol=1e-4, rtol=1e-4)
    close = {"rel": 2e-3, "abs": 2e-3}
    for index in itertools.product(*map(range, batch)):
        parts = []
        for m, member in enumerate(nets):
            said = slow_predict(member, *(x[index] for x in given[:3]), sample)
            mean, scale, weights = map(torch.tensor, said[:3])
            expected = (weights.unsqueeze(-1) * mean).sum(0).tolist()
            assert info["means"][index][m].tolist() == pytest.approx(expected, **close)
            scale = scale if std is None else torch.as_tensor(std).expand(len(mean), len(rows))
            shares = (weights / len(nets)).tolist()
            parts += zip(shares, (mean @ rows.T).tolist(), scale.tolist(), strict=True)
        expected = log_density((rows @ given[3][index]).tolist(), parts)
        assert log_prob[index].item() == pytest.approx(expected, **close)


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
        ({"std": 0.0}, ValueError, "std must be finite and lie in"),
        ({"std": math.inf}, ValueError, "std must be finite and lie in"),
        ({"std": torch.tensor([1.0, -2.0, 1.0])}, ValueError, "std must be positive and finite"),
        ({"std": torch.tensor([1.0, 0.0, 1.0])}, ValueError, "std must be positive and finite"),
        ({"std": torch.tensor([1.0, math.inf, 1.0])}, ValueError, "std must be positive and fin"),
        ({"std": 1.0, "transform": torch.full((1, 3), math.nan)}, ValueError, "transform holds 3"),
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
