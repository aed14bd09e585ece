"""The ensemble's loss against a loop over members and rows, and against closed forms."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from densities import log_density
from tensordict import TensorDict
from torch import nn
from torchrl.data import Categorical, OneHot

from layeredrl_torchrl import ModelLoss
from layeredrl_torchrl.objectives._likelihood import _Surprise

N, D = 7, 2


def make_batch(model, shape=(N,), valid=False, weight=False):
    action = model.action_spec.rand(shape)
    data = {
        "state": torch.randn(*shape, D) + 1.0,
        "context": torch.randn(*shape, model.context_dim),
        "action": action,
        "next": {
            "state": 2.0 * torch.randn(*shape, D),
            "terminated": torch.rand(*shape, 1) < 0.4,
        },
    }
    if valid:
        data["valid"] = torch.rand(shape) < 0.6
        data["valid"][..., 0] = True
    if weight:
        data["weight"] = 3.0 * torch.rand(shape)
    return TensorDict(data, shape)


def fit(model):
    """Give the model statistics that are neither 0 nor 1."""
    n = 50
    state, next_state = 3 * torch.randn(n, D) + 1, 0.5 * torch.randn(n, D) - 2
    model.fit_statistics(
        state, torch.randn(n, model.context_dim), model.action_spec.rand((n,)), next_state
    )
    return model


def naive_loss(model, batch, per_member):
    """One member and one row at a time: sums over members of mean NLL and mean BCE."""
    dynamics = termination = 0.0
    loc, scale = model.scaling.target.loc, model.scaling.target.scale
    for m in range(model.n_models):
        rows = batch[m] if per_member else batch
        total = nll = bce = 0.0
        for row in rows.unbind(0):
            weight = float(row["weight"]) if "weight" in row.keys() else 1.0
            weight *= float(row["valid"]) if "valid" in row.keys() else 1.0
            inputs = (row[key].expand(model.n_models, 1, -1) for key in ("state", "context"))
            action = row["action"].expand(model.n_models, 1, *row["action"].shape)
            with torch.no_grad():
                (mean, std), modes, term = model.predict_members(*inputs, action)
            # from the state back to the units that the networks predict in
            delta = row["state"] if model.scaling.predict_delta else 0.0
            target = (row["next", "state"] - delta - loc) / scale
            mean, std = (mean[m, 0] - delta - loc) / scale, std[m, 0] / scale
            parts = zip(modes[m, 0].tolist(), mean.tolist(), std.tolist(), strict=True)
            p = float(term[m, 0])
            nll -= weight * log_density(target.tolist(), parts)
            bce -= weight * math.log(p if bool(row["next", "terminated"]) else 1.0 - p)
            total += weight
        dynamics, termination = dynamics + nll / total, termination + bce / total
    return dynamics, termination


CASES = [
    # options of the model, per_member, valid, weight
    ({"n_modes": 1}, False, False, False),
    ({"n_modes": 2}, True, True, False),
    ({"n_modes": 1}, True, True, True),
    ({"n_modes": 3}, False, True, True),
    ({"predict_delta": False}, False, False, True),
    ({"normalize_targets": False}, False, False, False),
    ({"normalize_inputs": False}, False, False, False),
    ({"action_space": OneHot(3)}, False, False, False),
    ({"action_space": Categorical(3)}, True, False, False),
]


@pytest.mark.parametrize(("options", "per_member", "valid", "weight"), CASES)
def test_equals_a_loop_over_members_and_rows(make_ensemble, options, per_member, valid, weight):
    model = fit(make_ensemble(context_dim=1, n_models=3, **options))
    batch = make_batch(model, (3, N) if per_member else (N,), valid, weight)

    out = ModelLoss(model, per_member=per_member, huber_std=None)(batch)

    dynamics, termination = naive_loss(model, batch, per_member)
    assert out["loss_dynamics"].item() == pytest.approx(dynamics, rel=1e-4)
    assert out["loss_termination"].item() == pytest.approx(termination, rel=1e-4)
    assert out["nll"].item() == pytest.approx(dynamics / 3 / D, rel=1e-4)
    assert out["termination_bce"].item() == pytest.approx(termination / 3, rel=1e-4)


def gradients(model, batch, beta=0.0):
    model.zero_grad()
    out = ModelLoss(model, beta=beta)(batch)
    (out["loss_dynamics"] + out["loss_termination"]).backward()
    return out.detach().to_dict(), [p.grad.clone() for p in model.members.parameters()]


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("garbage", [1e6, float("nan")])
def test_rows_that_are_not_valid_have_no_influence(make_ensemble, garbage, beta):
    model = make_ensemble(n_modes=2)
    batch = make_batch(model, valid=True)
    outside = ~batch["valid"]
    assert 0 < outside.sum() < N
    kept = batch[batch["valid"]].exclude("valid")
    for key in ("state", "action", ("next", "state")):
        batch[key][outside] = garbage
    batch["next", "terminated"][outside] = True
    torch.testing.assert_close(gradients(model, batch, beta), gradients(model, kept, beta))


@pytest.mark.parametrize("space", [OneHot(3), Categorical(3), Categorical(3, (1,))])
def test_rows_that_are_not_valid_need_no_choice(make_ensemble, space):
    """Padding of one-hot actions is zeros, and of numbers often -1."""
    model = make_ensemble(action_space=space)
    batch = make_batch(model, valid=True)
    kept = batch[batch["valid"]].exclude("valid")
    batch["action"][~batch["valid"]] = 0 if isinstance(space, OneHot) else -1
    torch.testing.assert_close(gradients(model, batch), gradients(model, kept))


def test_float64_is_taken_as_far_as_the_model_can_tell_it_apart(make_ensemble):
    model = make_ensemble()
    batch = make_batch(model, (20,))
    wide = batch.apply(lambda x: x.double() if x.is_floating_point() else x)
    torch.testing.assert_close(gradients(model, wide), gradients(model, batch))
    state, action = wide["state"] + 1e9, wide["action"]
    wide["state"] = state
    match = r"dimension\(s\) \[0, 1\] of .*state.* vary by less than torch.float32 can tell apart"
    with pytest.raises(ValueError, match=match):
        ModelLoss(model)(wide)
    with pytest.raises(ValueError, match=match):
        model.predict(state, None, action)
    with pytest.raises(ValueError, match=match):
        model.rollout(state, None, action.unsqueeze(1))


@pytest.mark.parametrize("n", [1, 5])
def test_terminations_may_lack_their_last_axis(make_ensemble, n):
    model = make_ensemble()
    batch = make_batch(model, (n,))
    expected = gradients(model, batch)
    batch["next", "terminated"] = batch["next", "terminated"].squeeze(-1)
    torch.testing.assert_close(gradients(model, batch), expected)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("state", (N, D + 1)),
        ("state", (N, 1, D)),
        (("next", "state"), (N, 1)),  # which would broadcast
        ("action", (N, 2)),
        ("action", (N,)),
        (("next", "terminated"), (N, 2)),
    ],
)
def test_entries_of_another_shape_are_named(make_ensemble, key, shape):
    model = make_ensemble()
    batch = make_batch(model)
    batch[key] = torch.zeros(shape)
    name = str(key).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=f"ModelLoss: '?{name}'? has shape"):
        ModelLoss(model)(batch)


class Constant(nn.Module):
    """A member that predicts one Gaussian and one termination probability for all inputs."""

    def __init__(self, mean, std, term_prob):
        super().__init__()
        self.mean, self.std = nn.Parameter(mean.clone()), nn.Parameter(std.clone())
        self.term_prob = nn.Parameter(torch.as_tensor(term_prob))

    def forward(self, state, context, action):
        ones = torch.ones_like(state[..., 0])
        shape = (*ones.shape, 1, D)
        return (
            (self.mean.expand(shape), self.std.expand(shape)),
            ones.unsqueeze(-1),
            (self.term_prob * ones),
        )


def test_mask_and_weights_may_keep_a_last_axis(make_ensemble):
    model = make_ensemble()
    batch = make_batch(model, valid=True, weight=True)
    loss = ModelLoss(model)
    expected = loss(batch)
    for key in ("valid", "weight"):
        batch[key] = batch[key].unsqueeze(-1)
    torch.testing.assert_close(loss(batch).to_dict(), expected.to_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_terminations_may_be_zeros_and_ones_of_any_dtype(make_ensemble, dtype):
    loss = ModelLoss(make_ensemble())
    batch = make_batch(loss.model, (20,))
    assert {True, False} == set(batch["next", "terminated"].flatten().tolist())
    expected = loss(batch)
    batch["next", "terminated"] = batch["next", "terminated"].to(dtype)
    assert (loss(batch) == expected).all()


def test_it_is_the_loss_of_the_weights_under_training(make_ensemble):
    """Predictions may come from averaged weights; the loss does not."""
    model = make_ensemble(ema_decay=0.9)
    model.update_average()
    plain = make_ensemble(ema_decay=None)
    with torch.no_grad():
        for parameter in model.members.parameters():
            parameter.add_(0.3)
    plain.members.load_state_dict(model.members.state_dict())
    batch = make_batch(model)
    torch.testing.assert_close(ModelLoss(model)(batch).to_dict(), ModelLoss(plain)(batch).to_dict())


@pytest.mark.parametrize(
    ("per_member", "shape", "uncounted", "message"),
    [
        (True, (3, N), None, "N"),
        (True, (2, 2, N), None, "N"),
        (False, (2, N), None, "N"),
        (True, (N,), None, "N"),
        (False, (N,), "valid", "no transition"),
        (False, (N,), "weight", "no transition"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(make_ensemble, per_member, shape, uncounted, message):
    model = make_ensemble(n_models=2)
    batch = make_batch(model, shape, valid=True, weight=True)
    if uncounted:
        batch[uncounted] = torch.zeros_like(batch[uncounted])
    with pytest.raises(ValueError, match=message):
        ModelLoss(model, per_member=per_member)(batch)


# -- beta-NLL -----------------------------------------------------------------------------------


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
def test_beta_of_means_falls_to_that_of_the_stds_where_they_explain(
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
    of_means = (beta * (unexplained / 0.1).clamp(max=1.0)).clamp(min=of_stds)
    for name, power, gradient in (
        ("mean", of_means, error / std**2),
        ("log_std", of_stds, 1 - error**2 / std**2),
    ):
        v = std ** (2 * power)
        expected = (counted * v / (share * v).sum(0).mean(0) * gradient).sum(0)
        torch.testing.assert_close(grads[name], expected, rtol=1e-3, atol=1e-4)


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


# -- single readings ----------------------------------------------------------------------------


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
