"""Calibration of the std: its formula in loops, what it is fitted to, and where it counts."""

from __future__ import annotations

import itertools
import math

import gymnasium as gym
import pytest
import torch
from densities import log_density
from tensordict import TensorDict

from layeredrl_torchrl.models import GaussianMixture
from layeredrl_torchrl.models.calibration import Calibration


def set_to(calibration, shift, slope, spread):
    calibration.shift.copy_(torch.tensor(shift))
    calibration.slope.copy_(torch.tensor(slope))
    calibration.spread.fill_(spread)


def corrected(std, shift, slope, spread, member, n_models):
    """The log std shifted and stretched, and wider from the first member to the last."""
    offset = -1 + 2 * member / (n_models - 1) if n_models > 1 else 0.0
    return math.exp(shift + slope * math.log(std) + spread * offset)


@pytest.mark.parametrize("n_models", [1, 2, 5])
@pytest.mark.parametrize("shape", [(4, 2), (4, 3, 2)])
def test_a_std_is_shifted_and_stretched_and_spread_over_the_members(n_models, shape):
    calibration = Calibration(n_models, 2)
    set_to(calibration, [0.3, -0.8], [0.7, 1.2], 0.4)
    std = torch.rand(n_models, *shape) + 0.1
    out = calibration(std)
    assert out.shape == std.shape
    for index in itertools.product(*map(range, std.shape)):
        m, d = index[0], index[-1]
        expected = corrected(std[index].item(), (0.3, -0.8)[d], (0.7, 1.2)[d], 0.4, m, n_models)
        assert out[index].item() == pytest.approx(expected, rel=1e-4)


def test_predictions_use_it_in_units_of_the_target(net, recorded, transitions):
    ensemble, _ = recorded(net, d=2)
    ensemble.fit_statistics(*transitions(d=2))
    given = torch.randn(4, 2), torch.randn(4, 2), torch.randn(4, 2)
    before = ensemble.predict(*given)
    set_to(ensemble.calibration, [0.3, -0.8], [0.7, 1.2], 0.4)
    after = ensemble.predict(*given)
    for i in (0, 1, 3):
        assert torch.equal(after[i], before[i])
    unit = ensemble.scaling.target.scale.tolist()
    for b, m, k, d in itertools.product(range(4), range(3), range(2), range(2)):
        raw = before[2][b, m, k, d].item() / unit[d]
        expected = corrected(raw, (0.3, -0.8)[d], (0.7, 1.2)[d], 0.4, m, 3) * unit[d]
        assert after[2][b, m, k, d].item() == pytest.approx(expected, rel=1e-4)


def test_means_move_towards_the_mean_of_all():
    calibration = Calibration(3, 2)
    mean, weights = torch.randn(3, 4, 2, 2), torch.rand(3, 4, 2)
    weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(calibration.reconcile(mean, weights), mean)
    calibration.disagreement.fill_(0.3)
    out = calibration.reconcile(mean, weights)
    for i, d in itertools.product(range(4), range(2)):
        of_member = [
            sum(weights[m, i, k].item() * mean[m, i, k, d].item() for k in range(2))
            for m in range(3)
        ]
        center = sum(of_member) / 3
        for m, k in itertools.product(range(3), range(2)):
            expected = mean[m, i, k, d].item() - 0.7 * (of_member[m] - center)
            assert out[m, i, k, d].item() == pytest.approx(expected, abs=1e-5)


def test_predictions_of_all_members_are_reconciled_and_rollouts_are_not(fc, recorded, transitions):
    ensemble, _ = recorded(fc, d=2, n_models=3)
    ensemble.fit_statistics(*transitions(d=2))
    state, context, action = torch.randn(4, 2), torch.randn(4, 2), torch.randn(4, 2)
    before = ensemble.predict(state, context, action)
    rolled = ensemble.rollout(state, context, action.unsqueeze(1), deterministic=True)
    ensemble.calibration.disagreement.fill_(0.3)
    after = ensemble.predict(state, context, action)
    center = (before[1].unsqueeze(-1) * before[0]).sum(-2).mean(1)
    torch.testing.assert_close((after[1].unsqueeze(-1) * after[0]).sum(-2).mean(1), center)
    for i in (1, 2, 3):
        assert torch.equal(after[i], before[i])
    td = TensorDict(state=state, context=context, action=action, batch_size=4)
    torch.testing.assert_close(ensemble.dist(td).mean, center)
    apart = GaussianMixture(
        *(x.flatten(1, 2) for x in (before[0], before[2])), before[1].flatten(1)
    )
    assert (ensemble.dist(td).variance < apart.variance).all()
    again = ensemble.rollout(state, context, action.unsqueeze(1), deterministic=True)
    assert torch.equal(again["next", "state"], rolled["next", "state"])


def penalised_nll(calibration, mean, std, weights, target):
    """Of the marginal mixtures over members and modes, and of the prior, in Python floats.

    The prior's standard deviations are 0.5, 0.25, 0.5 and 1 for shift, slope, spread and the
    logarithm of the disagreement; the last two serve all dimensions and count as often.
    """
    scale, mean = calibration(std), calibration.reconcile(mean, weights)
    n_models, n, _, dim = mean.shape
    total = 0.0
    for i, d in itertools.product(range(n), range(dim)):
        shares = (weights[:, i] / n_models).flatten().tolist()
        means, stds = (x[:, i, :, d].reshape(-1, 1).tolist() for x in (mean, scale))
        total -= log_density([target[i, d].item()], zip(shares, means, stds, strict=True))
    prior = sum(
        (shift / 0.5) ** 2 + ((slope - 1) / 0.25) ** 2
        for shift, slope in zip(calibration.shift.tolist(), calibration.slope.tolist(), strict=True)
    )
    log_share = math.log(calibration.disagreement.item())
    return total + 0.5 * (prior + dim * ((calibration.spread.item() / 0.5) ** 2 + log_share**2))


def test_fit_finds_the_minimum_of_the_held_out_nll_and_its_prior():
    """So few rows that the prior weighs something: any step away is worse."""
    generator = torch.Generator().manual_seed(0)
    n_models, n, n_modes, dim = 3, 20, 2, 2
    shape = (n_models, n, n_modes, dim)
    mean = 2.0 * torch.randn(shape, generator=generator, dtype=torch.float64)
    std = 0.2 + torch.rand(shape, generator=generator, dtype=torch.float64)
    weights = torch.rand(shape[:3], generator=generator, dtype=torch.float64)
    weights = weights / weights.sum(-1, keepdim=True)
    # residuals half as large as predicted in one dimension, three times as large in the other
    true = std[0, :, 0] * torch.tensor([0.5, 3.0])
    target = mean.mean((0, 2)) + true * torch.randn(n, dim, generator=generator)
    calibration = Calibration(n_models, dim).double()
    calibration.fit(mean, std, weights, target)
    best = penalised_nll(calibration, mean, std, weights, target)
    for name in ("shift", "slope", "spread", "disagreement"):
        entries = getattr(calibration, name).reshape(-1)  # a view
        for d, step in itertools.product(range(len(entries)), (-0.03, 0.03)):
            entries[d] += step
            assert penalised_nll(calibration, mean, std, weights, target) > best, (name, d, step)
            entries[d] -= step
    assert calibration.shift[0] < -0.1 < 0.1 < calibration.shift[1]
    assert abs(calibration.spread) > 0.02
    assert abs(calibration.disagreement - 1) > 0.1


@pytest.mark.parametrize("discrete", [0, 3])
def test_calibrate_makes_held_out_data_likelier_and_changes_nothing_else(
    discrete, fc, recorded, transitions
):
    space = gym.spaces.Discrete(discrete) if discrete else None
    ensemble, _ = recorded(fc, n_modes=1, action_space=space)
    state, context, action, next_state = transitions(300, discrete=discrete)
    ensemble.fit_statistics(state, context, action, next_state)
    # an untrained ensemble: its std has nothing to do with its errors
    before = {name: x.clone() for name, x in ensemble.state_dict().items()}
    with torch.no_grad():
        old = ensemble.get_log_prob(state, context, action, next_state)[0].mean()
        ensemble.calibrate(state, context, action, next_state)
        new = ensemble.get_log_prob(state, context, action, next_state)[0].mean()
    assert new > old + 0.1
    changed = {n for n, x in ensemble.state_dict().items() if not torch.equal(x, before[n])}
    parts = ("shift", "slope", "spread", "disagreement")
    assert changed == {f"calibration.{part}" for part in parts}
    assert all(p.grad is None for p in ensemble.parameters())


def test_where_float32_overflows_it_is_fitted_in_float64():
    """One error of 1e20 stds, whose square float32 does not hold."""
    shape = (2, 30, 1, 1)
    mean, std, weights = torch.zeros(shape), torch.full(shape, 1e-3), torch.ones(shape[:3])
    target = 1e-3 * torch.randn(30, 1)
    target[7] = 1e17
    found = []
    for dtype in (torch.float32, torch.float64):
        calibration = Calibration(2, 1).to(dtype)
        calibration.fit(*(x.to(dtype) for x in (mean, std, weights, target)))
        found.append([x.double() for x in calibration.state_dict().values()])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
    assert all(x.isfinite().all() for x in found[0])
