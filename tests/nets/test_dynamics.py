"""The built-in member network: closed forms of its outputs, its inputs, its stacked form."""

from __future__ import annotations

import math

import gymnasium as gym
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchrl.data import Categorical, OneHot

from layeredrl_torchrl import ProbFCDynamics, RewardNet
from layeredrl_torchrl.nets import StackedProbFCDynamics
from layeredrl_torchrl.nets._gaussians import LogStdBounds, mixture_parameters

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


# -- reading the last layer ----------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    batch=st.sampled_from(BATCHES),
    n_modes=st.integers(1, 3),
    dim=st.integers(1, 3),
    spread=st.sampled_from([0.1, 1.0, 10.0, 100.0]),
    bounds=st.sampled_from([(-7.0, 2.0), (-3.0, -1.0), (-1.0, 4.0)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
def test_the_mixture_is_read_as_the_closed_form_says(
    batch, n_modes, dim, spread, bounds, dtype, seed
):
    generator = torch.Generator().manual_seed(seed)
    size = 2 * n_modes * dim + n_modes + 1
    out = spread * torch.randn(*batch, size, generator=generator, dtype=dtype)
    (mean, std), weights, term_prob = mixture_parameters(out, n_modes, dim, LogStdBounds(*bounds))
    assert mean.shape == std.shape == (*batch, n_modes, dim)
    assert weights.shape == (*batch, n_modes)
    assert term_prob.shape == batch
    assert mean.dtype == std.dtype == weights.dtype == term_prob.dtype == dtype

    low, high = bounds
    close = {"rel": 1e-4, "abs": 1e-6} if dtype == torch.float32 else {"rel": 1e-9, "abs": 1e-12}
    rows = out.reshape(-1, size).tolist()
    for i, row in enumerate(rows):
        logits = row[2 * n_modes * dim : -1]
        total = sum(math.exp(logit - max(logits)) for logit in logits)
        for k in range(n_modes):
            for d in range(dim):
                assert mean.reshape(-1, n_modes, dim)[i, k, d] == row[k * dim + d]
                middle, half = (low + high) / 2, (high - low) / 2
                raw = row[n_modes * dim + k * dim + d]
                log_std = middle + half * math.tanh((raw - middle) / half)
                got = float(std.reshape(-1, n_modes, dim)[i, k, d])
                assert got == pytest.approx(math.exp(log_std), **close)
            expected = math.exp(logits[k] - max(logits)) / total
            assert float(weights.reshape(-1, n_modes)[i, k]) == pytest.approx(expected, **close)
        # the sigmoid written so that it does not overflow
        expected = 0.5 * (1 + math.tanh(row[-1] / 2))
        assert float(term_prob.reshape(-1)[i]) == pytest.approx(expected, **close)


@pytest.mark.parametrize("raw", [-1e6, -50.0, 0.0, 50.0, 1e6])
def test_extreme_outputs_keep_a_positive_bounded_std_and_finite_weights(raw):
    low, high = -7.0, 2.0
    (_, std), weights, term_prob = mixture_parameters(
        torch.full((5, 11), raw), 2, 2, LogStdBounds(low, high)
    )
    assert (std >= math.exp(low) * (1 - 1e-6)).all()
    assert (std <= math.exp(high) * 1.001).all()
    torch.testing.assert_close(weights, torch.full((5, 2), 0.5))
    assert ((term_prob >= 0) & (term_prob <= 1)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_in_float32(dtype):
    out = torch.randn(4, 11).to(dtype)
    half = mixture_parameters(out, 2, 2, LogStdBounds(-7.0, 2.0))
    full = mixture_parameters(out.float(), 2, 2, LogStdBounds(-7.0, 2.0))
    for got, expected in zip((*half[0], *half[1:]), (*full[0], *full[1:]), strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)


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
def test_the_inputs_are_state_context_and_action_in_this_order(batch, ignore_context, hidden_sizes):
    """The context is left out by default."""
    options = {} if ignore_context is None else {"ignore_context": ignore_context}
    net = make(hidden_sizes=hidden_sizes, **options)
    ignore_context = ignore_context is not False
    state, context, action = (torch.randn(*batch, n) for n in (3, 2, 2))
    (mean, _), _, term_prob = net(state, context, action)
    used = (state, action) if ignore_context else (state, context, action)
    rows = torch.cat(used, dim=-1).reshape(-1, 5 if ignore_context else 7).tolist()
    for i, row in enumerate(rows):
        out = by_hand(net, row)
        assert mean.reshape(-1, 6)[i].tolist() == pytest.approx(out[:6], abs=1e-5, rel=1e-4)
        expected = 1 / (1 + math.exp(-out[-1]))
        assert term_prob.reshape(-1)[i].item() == pytest.approx(expected, abs=1e-5)


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
