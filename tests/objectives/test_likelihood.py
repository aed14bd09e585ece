"""The likelihood that an ensemble learns by: beta-NLL, modes, and errors of many stds."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from model_batches import Constant, D, N, fit, gradients, make_batch
from torch import nn

from layeredrl_torchrl import ModelLoss
from layeredrl_torchrl.objectives._likelihood import _Surprise, mixture_loss


class Slope(nn.Module):
    """A Gaussian whose std grows with the state, from a thousandth to one."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([[0.5, -1.0]]))
        self.log_std = nn.Parameter(torch.tensor([[-6.0, 0.5]]))

    def forward(self, state, context, action):
        std = (self.log_std + state[..., None, :1].clamp(-1, 1)).exp()
        shape = (*state.shape[:-1], 1, D)
        one = torch.ones(shape[:-1])
        return (self.mean.expand(shape), std.expand(shape)), one, 0.2 * one.squeeze(-1)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_beta_weights_each_row_by_its_variance_and_no_dimension_by_its_unit(make_ensemble, beta):
    """The derivatives of the mean are ``v (mean - y) / std ** 2``, averaged, with ``v = std ** (2
    beta)`` divided by its average; with ``beta = 1`` they are those of squared errors."""
    model = make_ensemble(
        n_models=1,
        partial_net=lambda *spaces: Slope(),
        predict_delta=False,
        normalize_targets=False,
    )
    batch = make_batch(model, weight=True)

    out = ModelLoss(model, beta=beta, huber_std=None)(batch)
    out["loss_dynamics"].backward()

    share = (batch["weight"] / batch["weight"].sum()).unsqueeze(-1)
    net = Slope()
    std = (net.log_std + batch["state"][:, :1].clamp(-1, 1)).exp().detach()
    error = net.mean.detach() - batch["next", "state"]
    v = std ** (2 * beta) / (share * std ** (2 * beta)).sum(0)
    grads = {name.split(".")[-1]: p.grad for name, p in model.members.named_parameters()}
    expected = (share * v * error / std**2).sum(0)
    torch.testing.assert_close(grads["mean"].flatten(), expected, rtol=1e-3, atol=1e-3)
    expected = (share * v * (1 - error**2 / std**2)).sum(0)
    torch.testing.assert_close(grads["log_std"].flatten(), expected, rtol=1e-3, atol=1e-3)
    log_prob = torch.distributions.Normal(net.mean.detach(), std).log_prob(batch["next", "state"])
    value = -(share * v * log_prob).sum()
    assert out["loss_dynamics"].item() == pytest.approx(value.item(), rel=1e-4)
    # what is logged stays the likelihood
    assert out["nll"].item() == pytest.approx(-(share * log_prob).sum().item() / D, rel=1e-4)


class Apart(nn.Module):
    """Modes with means, stds and weights of their own, whose stds differ between rows, too."""

    def __init__(self, n_modes):
        super().__init__()
        self.mean = nn.Parameter(torch.randn(n_modes, D))
        self.log_std = nn.Parameter(torch.randn(n_modes, D))
        self.weights = torch.softmax(torch.randn(n_modes), 0)

    def forward(self, state, context, action):
        std = (self.log_std + state[..., None, :1].clamp(-1, 1)).exp()
        weights = self.weights.expand(std.shape[:-1])
        return (self.mean.expand(std.shape), std), weights, 0.2 * torch.ones(std.shape[:-2])


@pytest.mark.parametrize("n_modes", [1, 3])
@pytest.mark.parametrize("far", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("annealed", [0.0, 0.3, torch.tensor(0.3), torch.tensor(0.7), 0.7])
def test_beta_of_means_falls_where_they_explain_once_that_of_the_stds_does(
    make_ensemble, annealed, far, n_modes
):
    """Means are ``far`` from the targets of one dimension, and farther from those of the other."""
    net, beta, of_stds = Apart(n_modes), 0.7, float(annealed)
    net.mean.data[:, 1] *= far
    model = make_ensemble(
        n_models=1,
        n_modes=n_modes,
        partial_net=lambda *spaces: copy.deepcopy(net),
        predict_delta=False,
        normalize_targets=False,
    )
    batch = make_batch(model, weight=True)
    target = batch["next", "state"]
    target[:, 1] *= far
    loss = ModelLoss(model, beta=beta, huber_std=None)
    loss.terms(loss.prepare(batch)._replace(beta=annealed))["loss_dynamics"].backward()
    grads = {name.split(".")[-1]: p.grad[0] for name, p in model.members.named_parameters()}

    share = (batch["weight"] / batch["weight"].sum())[:, None, None]
    normal = torch.distributions.Normal(
        net.mean.detach(), (net.log_std + batch["state"][:, None, :1].clamp(-1, 1)).exp().detach()
    )
    std, error = normal.stddev, net.mean.detach() - target[:, None]  # [N, K, D]
    joint = net.weights.log() + normal.log_prob(target[:, None]).sum(-1)
    counted = share * joint.softmax(-1).unsqueeze(-1)
    unexplained = (share * net.weights[:, None] * error**2).sum((0, 1))
    assert unexplained[0] > 0.1
    left = (unexplained / 0.1).clamp(max=1.0) if of_stds < 0.69 else torch.ones(D)
    of_means = beta * left
    for name, power, gradient in (
        ("mean", of_means, error / std**2),
        ("log_std", of_stds, 1 - error**2 / std**2),
    ):
        v = std ** (2 * power)
        expected = (counted * v / (share * v).sum(0).mean(0) * gradient).sum(0)
        torch.testing.assert_close(grads[name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e4])
@pytest.mark.parametrize("of_stds", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("of_means", [0.5, 1.0])
def test_a_member_without_rows_loses_nothing_and_changes_no_other(of_means, of_stds, size):
    shape = (2, 9, 3, D)
    mean = (size * torch.randn(shape)).requires_grad_()
    std = (size * (0.5 + torch.rand(shape))).requires_grad_()
    log_weights = torch.rand(shape[:-1]).softmax(-1).log()
    target = size * torch.randn(2, 9, 1, D)
    weight = torch.stack([torch.full((9,), 1 / 9), torch.zeros(9)])
    options = {"of_means": of_means, "of_stds": torch.tensor(of_stds), "limit": 10.0}

    def run(rows):
        parts = mean[rows], std[rows], log_weights[rows]
        loss, nll = mixture_loss(parts, target[rows], weight[rows], **options)
        return loss, nll, *torch.autograd.grad(loss.sum(), (mean, std))

    loss, nll, *grads = run(slice(None))
    alone_loss, alone_nll, *alone_grads = run(slice(1))
    assert loss[1] == nll[1] == 0
    torch.testing.assert_close((loss[:1], nll[:1]), (alone_loss, alone_nll))
    for found, alone in zip(grads, alone_grads, strict=True):
        assert not found[1].any()
        torch.testing.assert_close(found, alone)


def test_each_mode_is_weighted_by_its_own_std(make_ensemble):
    """Against a loop over rows, members and modes."""
    model, beta = fit(make_ensemble(n_modes=3)), 0.5
    batch = make_batch(model)
    model.zero_grad()
    value = ModelLoss(model, beta=beta)(batch)["loss_dynamics"]
    value.backward()
    grads = [p.grad.clone() for p in model.members.parameters()]

    model.zero_grad()
    inputs = (batch[key].expand(model.n_models, N, -1) for key in ("state", "context", "action"))
    (mean, std), weights, _ = model.predict_normalized(*inputs)
    target = model.target(batch["state"], batch["next", "state"])
    total, constant = 0.0, 0.5 * math.log(2 * math.pi)
    v = std.detach() ** (2 * beta)
    v = v / v.mean((1, 2), keepdim=True)
    for m in range(model.n_models):
        for i in range(N):
            log_p = torch.distributions.Normal(mean[m, i], std[m, i]).log_prob(target[i])  # [K, D]
            share = (weights[m, i] * log_p.sum(-1).exp()).detach()
            share = share / share.sum()
            for k in range(3):
                # The constant of a density has no gradient, and is not weighted.
                parts = (v[m, i, k, d] * (log_p[k, d] + constant) - constant for d in range(D))
                scaled = sum(parts)
                total = total - share[k] * (weights[m, i, k].log() + scaled - share[k].log()) / N
    total.backward()
    torch.testing.assert_close(value, total, rtol=1e-4, atol=1e-4)
    expected = [
        p.grad if p.grad is not None else torch.zeros_like(p) for p in model.members.parameters()
    ]
    torch.testing.assert_close(grads, expected, rtol=1e-3, atol=1e-5)


class TwoModes(nn.Module):
    """Two equally likely modes of std 1: one where the target is, the other far from it."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([[0.0] * D, [13.8 / D**0.5] * D]))

    def forward(self, state, context, action):
        mean = self.mean.expand(*state.shape[:-1], 2, D)
        weights = torch.full(mean.shape[:-1], 0.5)
        return (mean, torch.ones_like(mean)), weights, weights[..., 0].clone()


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_an_impossible_mode_gives_no_subnormal_gradients(make_ensemble, beta):
    """Its likelihood is exp(-95) of the other's, a subnormal number: these are slow to multiply."""
    model = make_ensemble(
        n_modes=2,
        partial_net=lambda *spaces: TwoModes(),
        predict_delta=False,
        normalize_targets=False,
    )
    batch = make_batch(model)
    batch["next", "state"] = torch.zeros_like(batch["state"])

    _, grads = gradients(model, batch, beta)

    for grad in grads:
        assert not ((grad != 0) & (grad.abs() < torch.finfo(grad.dtype).tiny)).any()


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_errors_go_on_linearly_where_normal_ones_never_are(make_ensemble, beta):
    """Against torch's own Huber loss."""
    model = make_ensemble(
        n_models=1,
        partial_net=lambda *spaces: Constant(torch.zeros(D), torch.full((D,), 0.5), 0.5),
        predict_delta=False,
        normalize_targets=False,
    )
    batch = make_batch(model)
    batch["next", "state"][0] = 1e3
    target = batch["next", "state"]

    out, _ = gradients(model, batch, beta)

    error = torch.nn.functional.huber_loss(target / 0.5, torch.zeros(N, D), "none", delta=10.0)
    expected = (error + math.log(0.5) + 0.5 * math.log(2 * math.pi)).sum(-1).mean()
    assert out["loss_dynamics"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert out["nll"].item() == pytest.approx(expected.item() / D, rel=1e-5)


def test_single_readings_leave_the_gradient_to_the_others(make_ensemble):
    """One in N of a thousand stds: with the plain likelihood its gradient is most of the norm."""
    shares = []
    for huber_std in (10.0, None):
        model = fit(make_ensemble(n_models=1))
        batch = make_batch(model)
        grads = []
        for reading in (0.0, 1e4):
            batch["next", "state"][0, 1] = reading
            model.zero_grad()
            ModelLoss(model, huber_std=huber_std)(batch)["loss_dynamics"].backward()
            grads.append(torch.cat([p.grad.flatten() for p in model.members.parameters()]).norm())
        shares.append((grads[1] / grads[0]).item())
    assert shares[0] < 0.01 * shares[1]


def test_the_derivatives_of_a_density_are_those_of_its_differences():
    """By finite differences, on both sides of the limit, of the target too; and under vmap."""
    torch.manual_seed(1)
    mean, target = torch.randn(2, 3, 2, D).double(), torch.randn(2, 3, 1, D).double()
    std = 0.3 + torch.rand(2, 3, 2, D).double()
    z = ((target - mean) / std).abs()
    assert (z < 1.6).any()
    assert (z > 1.8).any()
    assert not ((z > 1.69) & (z < 1.71)).any()  # the second derivative jumps at 1.7
    inputs = [x.requires_grad_() for x in (mean, std, target)]

    def surprise(mean, std, target):
        constants = std.log().detach(), (mean - target).detach()
        return _Surprise.apply(mean, std, target, *constants, 1.7)[0]

    assert torch.autograd.gradcheck(surprise, inputs)
    torch.testing.assert_close(torch.vmap(surprise)(*inputs), surprise(*inputs))
