"""Calibration of the std: its formula in loops, what it is fitted to, and where it counts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
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


def test_before_it_is_fitted_it_changes_nothing():
    std = torch.rand(3, 4, 2, 5) + 0.1
    torch.testing.assert_close(Calibration(3, 5)(std), std)


@pytest.mark.parametrize("n_models", [1, 2, 5])
@pytest.mark.parametrize("shape", [(4, 2), (4, 3, 2)])
def test_the_formula(n_models, shape):
    calibration = Calibration(n_models, 2)
    set_to(calibration, [0.3, -0.8], [0.7, 1.2], 0.4)
    std = torch.rand(n_models, *shape) + 0.1
    out = calibration(std)
    assert out.shape == std.shape
    for index in itertools.product(*map(range, std.shape)):
        m, d = index[0], index[-1]
        expected = corrected(std[index].item(), (0.3, -0.8)[d], (0.7, 1.2)[d], 0.4, m, n_models)
        assert out[index].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["fc", "tanh"])
def test_predictions_use_it_in_units_of_the_target(kind, fc, tanh_net, recorded, transitions):
    ensemble, _ = recorded(fc if kind == "fc" else tanh_net, d=2)
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
    assert (ensemble.dist(td).variance < GaussianMixture(
        before[0].flatten(1, 2), before[2].flatten(1, 2), before[1].flatten(1) / 3
    ).variance).all()  # fmt: skip
    again = ensemble.rollout(state, context, action.unsqueeze(1), deterministic=True)
    assert torch.equal(again["next", "state"], rolled["next", "state"])


def test_fit_finds_how_far_members_lie_apart():
    """Targets around the center of members whose means differ by much more than the noise."""
    generator = torch.Generator().manual_seed(0)
    apart = torch.randn(5, 2000, 1, 2, generator=generator)
    mean = apart - apart.mean(0)
    std = torch.full_like(mean, 0.3)
    for share in (0.0, 1.0):
        member = torch.randint(5, (2000,), generator=generator)
        target = share * mean[member, torch.arange(2000), 0]
        target = target + 0.3 * torch.randn(2000, 2, generator=generator)
        calibration = Calibration(5, 2)
        calibration.fit(mean, std, torch.ones(5, 2000, 1), target)
        assert calibration.disagreement.item() == pytest.approx(share, abs=0.2)


def mean_nll(std, calibration, mean, weights, target):
    """Of the marginal mixture over members and modes, averaged over rows and dimensions."""
    scale = calibration(std)
    mean = calibration.reconcile(mean, weights)
    n_models, n, n_modes, dim = mean.shape
    total = 0.0
    for i, d in itertools.product(range(n), range(dim)):
        density = 0.0
        for m, k in itertools.product(range(n_models), range(n_modes)):
            s = scale[m, i, k, d].item()
            z = (target[i, d].item() - mean[m, i, k, d].item()) / s
            weight = weights[m, i, k].item() / n_models
            density += weight * math.exp(-0.5 * z * z) / (s * math.sqrt(2 * math.pi))
        total -= math.log(density)
    return total / (n * dim)


def test_fit_finds_a_minimum_of_the_held_out_nll():
    """So many rows that the prior weighs nothing; any step away from it is worse."""
    generator = torch.Generator().manual_seed(0)
    n_models, n, n_modes, dim = 2, 300, 2, 2
    mean = 0.1 * torch.randn(n_models, n, n_modes, dim, generator=generator)
    std = 0.2 + torch.rand(n_models, n, n_modes, dim, generator=generator)
    weights = torch.rand(n_models, n, n_modes, generator=generator)
    weights = weights / weights.sum(-1, keepdim=True)
    # residuals half as large as predicted in one dimension, twice as large in the other
    true = std[0, :, 0] * torch.tensor([0.5, 2.0])
    target = mean[0, :, 0] + true * torch.randn(n, dim, generator=generator)
    calibration = Calibration(n_models, dim)
    before = mean_nll(std, calibration, mean, weights, target)
    calibration.fit(mean, std, weights, target)
    best = mean_nll(std, calibration, mean, weights, target)
    assert best < before - 0.1
    assert calibration.shift[0] < -0.3
    assert calibration.shift[1] > 0.3
    for name, d, step in itertools.product(("shift", "slope", "spread"), (0, 1), (-0.4, 0.4)):
        value = getattr(calibration, name)
        old = value.clone()
        value.reshape(-1)[d if value.ndim else 0] += step
        assert mean_nll(std, calibration, mean, weights, target) > best
        value.copy_(old)


def test_a_std_that_is_right_stays_and_few_rows_move_it_little():
    generator = torch.Generator().manual_seed(0)

    def fitted(n, factor):
        std = 0.2 + torch.rand(3, n, 1, 2, generator=generator)
        std = std[:1].expand(3, -1, -1, -1)
        mean = torch.zeros_like(std)
        target = factor * std[0, :, 0] * torch.randn(n, 2, generator=generator)
        calibration = Calibration(3, 2)
        calibration.fit(mean, std, torch.ones(3, n, 1), target)
        return calibration

    right = fitted(4000, 1.0)
    assert right.shift.abs().max() < 0.1
    assert (right.slope - 1).abs().max() < 0.15
    assert right.spread.abs() < 0.3
    many = fitted(4000, 3.0)
    assert many.shift.mean().item() == pytest.approx(math.log(3.0), abs=0.1)
    few = Calibration(1, 2)
    ones = torch.ones(1, 1, 1, 2)
    few.fit(0 * ones, ones, ones[..., 0], 3 * ones[0, 0])
    # one residual of three std: the prior, worth four rows of shift, holds back
    for shift in few.shift.tolist():
        assert 1 - 9 * math.exp(-2 * shift) + 4 * shift == pytest.approx(0, abs=1e-2)
        assert shift < 0.6


def test_calibrate_makes_held_out_data_likelier_and_changes_nothing_else(fc, recorded, transitions):
    ensemble, _ = recorded(fc, n_modes=1)
    state, context, action, next_state = transitions(300)
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


def test_it_is_saved(fc, recorded):
    ensemble, _ = recorded(fc)
    set_to(ensemble.calibration, [0.3, -0.8, 0.1], [0.7, 1.2, 1.0], 0.4)
    ensemble.calibration.disagreement.fill_(0.3)
    other, _ = recorded(fc)
    other.load_state_dict(ensemble.state_dict())
    given = torch.randn(4, 3), torch.randn(4, 2), torch.randn(4, 2)
    for ours, theirs in zip(other.predict(*given), ensemble.predict(*given), strict=True):
        assert torch.equal(ours, theirs)
