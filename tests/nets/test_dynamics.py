"""The built-in member network: closed forms of its outputs, its inputs, its stacked form."""

from __future__ import annotations

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import make_ensemble
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from torchrl.data import Categorical, OneHot

from layeredrl_torchrl import ProbFCDynamics, RewardNet
from layeredrl_torchrl.nets import StackedProbFCDynamics

BATCHES = [(), (1,), (4,), (2, 3)]


def box(n):
    return gym.spaces.Box(-math.inf, math.inf, (n,))


def make(n_modes=2, d=3, c=2, space=None, **options):
    """A small network with biases that are not 0."""
    spaces = box(d), box(c), space or box(2)
    net = ProbFCDynamics(*spaces, n_modes, **{"hidden_sizes": (6,), **options})
    for layer in net.layers:
        nn.init.normal_(layer.bias, std=0.3)
    return net


# -- inputs --------------------------------------------------------------------------------


def by_hand(net, features):
    """The last layer of a default network for one row, from its weights, in Python floats."""
    x = features
    for i, layer in enumerate(net.layers):
        rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
        y = [sum(w * v for w, v in zip(weights, x, strict=True)) + bias for weights, bias in rows]
        if i == len(net.layers) - 1:
            return y
        y = [v * min(max(v + 3, 0), 6) / 6 for v in y]  # hardswish
        skip = i > 0 and len(x) == len(y)
        x = [v + u for v, u in zip(x, y, strict=True)] if skip else y
    return x


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("ignore_context", [None, False])
@pytest.mark.parametrize("hidden_sizes", [(4,), (5, 3), (4, 4, 4), (5, 5, 3)])
@pytest.mark.parametrize("bounds", [None, (-1.0, 4.0)])
def test_a_mixture_is_read_from_state_context_and_action_as_by_hand(
    batch, ignore_context, hidden_sizes, bounds
):
    """The context is left out by default."""
    options = {"ignore_context": ignore_context, "log_std_bounds": bounds}
    net = make(hidden_sizes=hidden_sizes, **{k: v for k, v in options.items() if v is not None})
    nn.init.normal_(net.layers[-1].weight, std=3.0)  # far into the bounds
    state, context, action = (torch.randn(*batch, n) for n in (3, 2, 2))
    (mean, std), weights, term_prob = net(state, context, action)
    assert mean.shape == std.shape == (*batch, 2, 3)
    assert weights.shape == (*batch, 2)
    assert term_prob.shape == batch
    used = (state, context, action) if ignore_context is False else (state, action)
    low, high = bounds or (-6.0, 1.0)
    middle, half = (low + high) / 2, (high - low) / 2
    for index in np.ndindex(*batch):
        out = by_hand(net, torch.cat([x[index] for x in used]).tolist())
        log_std = [middle + half * math.tanh((raw - middle) / half) for raw in out[6:12]]
        share = 1 / (1 + math.exp(out[13] - out[12]))
        expected = [*out[:6], *map(math.exp, log_std), share, 1 - share]
        got = torch.cat([mean[index].flatten(), std[index].flatten(), weights[index]]).tolist()
        assert got == pytest.approx(expected, abs=1e-5, rel=1e-3)
        ends = 1 / (1 + math.exp(-out[14]))
        assert term_prob[index].item() == pytest.approx(ends, abs=1e-5)


@pytest.mark.parametrize("raw", [-1e6, 1e6])
def test_extreme_outputs_keep_a_positive_bounded_std_and_finite_weights(raw):
    net = make()
    nn.init.constant_(net.layers[-1].bias, raw)
    (_, std), weights, term_prob = net(*(torch.randn(5, n) for n in (3, 2, 2)))
    assert (std >= math.exp(-6.0) * (1 - 1e-5)).all()
    assert (std <= math.exp(1.0) * 1.001).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(5))
    assert ((term_prob >= 0) & (term_prob <= 1)).all()


NETWORKS = {
    "dynamics": lambda space, **options: make(c=0, space=space, **options),
    "reward": lambda space, **options: RewardNet(3, 0, space, (6,), layer_norm=False, **options),
}


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize(
    "space",
    [gym.spaces.Discrete(4), Categorical(4), OneHot(4), OneHot(4, dtype=torch.float32)],
    ids=["Discrete", "Categorical", "OneHot", "OneHotFloat"],
)
def test_choices_enter_as_one_hot_features(space, build):
    """The twin is fed the one-hot floats as continuous actions."""
    net, twin = build(space), build(box(4))
    nn.init.normal_([*net.parameters()][-2])
    twin.load_state_dict(net.state_dict())
    for batch in BATCHES:
        state, context = torch.randn(*batch, 3), torch.zeros(*batch, 0)
        index = torch.randint(4, batch)
        rows = torch.eye(4)[index]
        action = rows.to(space.dtype) if isinstance(space, OneHot) else index
        torch.testing.assert_close(net(state, context, action), twin(state, context, rows))


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_a_nonlinearity_is_used_and_a_space_of_another_kind_refused(build):
    net = build(box(2), nonlinearity=nn.Identity)
    nn.init.normal_([*net.parameters()][-2])
    state, action, context = torch.randn(3), torch.randn(2), torch.zeros(0)
    outs = [net(k * state, context, k * action) for k in (-1, 0, 1)]
    low, middle, high = (out if isinstance(out, torch.Tensor) else out[0][0] for out in outs)
    torch.testing.assert_close((low + high) / 2, middle, atol=1e-5, rtol=1e-5)  # affine
    assert not torch.allclose(low, high)
    with pytest.raises(TypeError, match=r"action_(space|dim) is MultiBinary"):
        build(gym.spaces.MultiBinary(2))


# -- the stacked form ----------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    n_models=st.integers(1, 4),
    n_modes=st.integers(1, 3),
    n=st.integers(1, 4),
    d=st.integers(1, 3),
    c=st.integers(0, 2),
    hidden_sizes=st.lists(st.sampled_from([1, 4, 5]), min_size=1, max_size=3),
    ignore_context=st.booleans(),
    nonlinearity=st.sampled_from([nn.SiLU, nn.ReLU, nn.Tanh]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_stacked_equals_each_network_called_on_its_own(
    n_models, n_modes, n, d, c, hidden_sizes, ignore_context, nonlinearity, dtype
):
    nets = [
        make(
            n_modes,
            d,
            c,
            hidden_sizes=tuple(hidden_sizes),
            ignore_context=ignore_context,
            nonlinearity=nonlinearity,
            log_std_bounds=(-4.0, 1.0),
        ).to(dtype)
        for _ in range(n_models)
    ]
    stacked = ProbFCDynamics.stack(nets)
    assert isinstance(stacked, StackedProbFCDynamics)
    state, context, action = (torch.randn(n_models, n, k, dtype=dtype) for k in (d, c, 2))
    (mean, std), weights, term_prob = stacked(state, context, action)
    with torch.no_grad():  # has in-place steps of its own
        silent = stacked(state, context, action)
    for x, y in zip((mean, std, weights, term_prob), (*silent[0], *silent[1:]), strict=True):
        torch.testing.assert_close(x, y)
    for m, net in enumerate(nets):
        (one_mean, one_std), one_weights, one_term = net(state[m], context[m], action[m])
        torch.testing.assert_close(mean[m], one_mean)
        torch.testing.assert_close(std[m], one_std)
        torch.testing.assert_close(weights[m], one_weights)
        torch.testing.assert_close(term_prob[m], one_term)


class Halved(nn.Module):
    """A parametrization of weights."""

    def forward(self, weight):
        return weight / 2


def halve(layer):
    register_parametrization(layer, "weight", Halved())


def double(layer):
    layer.register_forward_hook(lambda layer, given, out: 2 * out)


@pytest.mark.filterwarnings("ignore:ProbFCDynamics cannot run under torch.vmap")
@pytest.mark.parametrize("change", [halve, double, nn.utils.parametrizations.spectral_norm])
def test_layers_that_do_more_than_their_weights_say_go_on_doing_so(change):
    nets = []

    def partial_net(*spaces):
        nets.append(ProbFCDynamics(*spaces, hidden_sizes=(6,)))
        nn.init.normal_(nets[-1].layers[-1].weight)
        change(nets[-1].layers[-1])
        return nets[-1]

    model = make_ensemble(partial_net=partial_net, n_models=2).eval()
    assert not isinstance(model.members, StackedProbFCDynamics)  # which trains the weights alone
    given = [torch.randn(2, 5, n) for n in (model.state_dim, 0, 1)]
    (mean, _), _, _ = model.members(*given)
    for m, net in enumerate(nets):
        (expected, _), _, _ = net.eval()(*(x[m] for x in given))
        torch.testing.assert_close(mean[m], expected)


@pytest.mark.parametrize("hidden_sizes", [(4, 3), (4, 4, 4)], ids=["plain", "skips"])
@pytest.mark.parametrize("nonlinearity", [nn.SiLU, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.GELU])
def test_gradients_of_the_stack_are_those_of_its_networks(nonlinearity, hidden_sizes):
    nets = [make(hidden_sizes=hidden_sizes, nonlinearity=nonlinearity) for _ in range(3)]
    stacked = ProbFCDynamics.stack(nets)
    state, context, action = (torch.randn(3, 5, k) for k in (3, 2, 2))

    def loss(out):
        (mean, std), weights, term_prob = out
        return mean.square().sum() + std.sum() + weights.square().sum() + term_prob.sum()

    loss(stacked(state, context, action)).backward()
    for m, net in enumerate(nets):
        loss(net(state[m], context[m], action[m])).backward()
        for layer, weight, bias in zip(net.layers, stacked.weights, stacked.biases, strict=True):
            torch.testing.assert_close(weight.grad[m], layer.weight.grad.T, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(bias.grad[m, 0], layer.bias.grad, atol=1e-5, rtol=1e-4)


def test_an_untrained_network_predicts_almost_no_change():
    """Weights are drawn by LeCun's rule, the last ones with a tenth of its std; no biases."""
    stack = make_ensemble(hidden=(300, 200), n_models=3).members
    for weight, n_in, share in zip(stack.weights, (3, 300, 200), (1.0, 1.0, 0.1), strict=True):
        assert weight.shape[-2] == n_in
        assert weight.std().item() == pytest.approx(share * n_in**-0.5, rel=0.1)
    assert not any(bias.any() for bias in stack.biases)
