"""Reward and value networks: closed forms, rescaling that keeps the function, input statistics."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from layeredrl_torchrl import RewardNet, ScalarHead, ValueNet
from layeredrl_torchrl.nets._averaging import move_towards

BATCHES = [(), (1,), (4,), (2, 3)]
D, C, A = 3, 2, 2


def randomize(head, seed=0):
    """Give the last layer, which starts at 0, something to say."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.net[-1].parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return head


def make(kind, context_dim=C, hidden_sizes=(6, 5), *, layer_norm=False, **options):
    options = {"hidden_sizes": hidden_sizes, "layer_norm": layer_norm} | options
    if kind == "value":
        return randomize(ValueNet(D, context_dim, **options))
    return randomize(RewardNet(D, context_dim, A, **options))


def inputs(batch, context_dim=C, n=A, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*batch, width, generator=generator) for width in (D, context_dim, n))


def by_hand(head, features, statistics, layer_norm=False):
    """A fully connected SiLU network on one row, from its weights, in Python floats."""
    x = [(f - m) / s for f, m, s in zip(features, *statistics, strict=True)]
    layers = [layer for layer in head.net if isinstance(layer, nn.Linear)]
    for i, layer in enumerate(layers):
        rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
        x = [sum(w * v for w, v in zip(weights, x, strict=True)) + bias for weights, bias in rows]
        if i == len(layers) - 1:
            break
        if layer_norm:
            mean = sum(x) / len(x)
            std = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + 1e-5)
            x = [(v - mean) / std for v in x]
        x = [v / (1 + math.exp(-v)) for v in x]
    return x[0] * float(head.out_scale) + float(head.out_loc)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(["reward", "value"]),
    batch=st.sampled_from(BATCHES),
    context_dim=st.integers(0, 2),
    hidden_sizes=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    fitted=st.booleans(),
    layer_norm=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_the_network_computed_by_hand_row_by_row(
    kind, batch, context_dim, hidden_sizes, fitted, layer_norm, seed
):
    head = make(kind, context_dim, tuple(hidden_sizes), layer_norm=layer_norm)

    def join(state, context, action):  # the value does not look at the action
        used = (state, context, action) if kind == "reward" else (state, context)
        return torch.cat(used, dim=-1).reshape(-1, sum(x.shape[-1] for x in used))

    given = inputs(batch, context_dim, seed=seed)
    rows = join(*given)
    statistics = [0.0] * rows.shape[1], [1.0] * rows.shape[1]
    if fitted:
        sample = tuple(2 * x + 1 for x in inputs((20,), context_dim, seed=2))
        head.fit_inputs(*sample)
        std, mean = torch.std_mean(join(*sample), 0, correction=0)
        statistics = mean.tolist(), std.tolist()
        head.out_loc.fill_(-3.0)
        head.out_scale.fill_(2.5)
    out = head(*given) if kind == "reward" else head(*given[:2], None)
    assert out.shape == batch
    expected = [by_hand(head, row, statistics, layer_norm) for row in rows.tolist()]
    assert out.flatten().tolist() == pytest.approx(expected, abs=1e-4, rel=1e-4)


@pytest.mark.parametrize("head", [RewardNet(D, C, A), ValueNet(D, C)], ids=["reward", "value"])
def test_an_untrained_head_says_0(head):
    assert torch.equal(head(*inputs((5,))), torch.zeros(5))
    head.rescale(0.0, 3.0)
    assert torch.equal(head(*inputs((5,))), torch.zeros(5))
    randomize(head).reset_parameters()
    assert torch.equal(head(*inputs((5,))), torch.zeros(5))


# -- rescale and fit_inputs ----------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["reward", "value"]),
    steps=st.lists(st.tuples(st.floats(-100, 100), st.floats(0.01, 100)), min_size=1, max_size=3),
)
def test_rescale_keeps_the_function(kind, steps):
    head = make(kind).double()
    given = [x.double() for x in inputs((7,))]
    before = head(*given)
    for loc, scale in steps:
        head.rescale(loc, scale)
        assert float(head.out_loc) == pytest.approx(loc)
        assert float(head.out_scale) == pytest.approx(scale)
        torch.testing.assert_close(head(*given), before, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_rescale_keeps_a_function_of_the_last_weights_or_bias_alone(part):
    head = ValueNet(D, C, (6,))
    nn.init.normal_(getattr(head.net[-1], part))
    before = head(*inputs((7,)))
    assert before.any()
    head.rescale(-3.0, 5.0)
    torch.testing.assert_close(head(*inputs((7,))), before)


@pytest.mark.parametrize(
    ("loc", "scale"),
    [(0.0, 0.0), (0.0, -1.0), (0.0, math.nan), (0.0, math.inf), (math.nan, 1.0)],
)
def test_a_scale_that_is_not_positive_and_finite_is_refused(loc, scale):
    head = make("value")
    before = head(*inputs((3,)))
    with pytest.raises(ValueError, match=r"finite and scale > 0, got"):
        head.rescale(loc, scale)
    assert torch.equal(head(*inputs((3,))), before)


# -- precision and options -----------------------------------------------------------------


@pytest.mark.parametrize("faster", [True, False])
def test_under_autocast_the_output_is_float32(faster, monkeypatch):
    """And autocast is followed only where bfloat16 is faster."""
    monkeypatch.setattr("layeredrl_torchrl._precision._pays", lambda *_: faster)
    head = make("reward")
    expected = head(*inputs((20,)))
    with torch.autocast("cpu", torch.bfloat16):
        out = head(*inputs((20,)))
    assert out.dtype == torch.float32
    assert torch.equal(out, expected) != faster
    torch.testing.assert_close(out, expected, atol=0.1, rtol=0.1)


def test_the_base_class_cannot_be_built():
    with pytest.raises(TypeError, match="abstract"):
        ScalarHead(3, (4,), nn.SiLU)


@pytest.mark.slow
@pytest.mark.parametrize(("dynamic", "n_heads", "n_shapes"), [(None, 9, 3), (False, 1, 10)])
def test_any_number_of_heads_and_shapes_stays_compiled(dynamic, n_heads, n_shapes):
    """Beyond torch's limit of 8, which would be an error here."""
    heads = [ValueNet(3, 0, (8,)) for _ in range(n_heads)]
    for head in heads:
        torch.nn.init.normal_(head.net[-1].weight)
        head.compile(backend="eager", dynamic=dynamic)
        assert head.state_dict().keys() == copy.deepcopy(head).state_dict().keys()
        for n in range(2, 2 + n_shapes):
            inputs = torch.randn(n, 3), torch.zeros(n, 0), None
            torch.testing.assert_close(head(*inputs), head.forward(*inputs))


@pytest.mark.parametrize("share", [0.25, torch.tensor(0.25)])
def test_an_average_moves_each_weight_once_also_one_that_layers_share(share):
    average, source = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))
    for net in (average, source):
        net[1].weight = net[0].weight
        net.register_buffer("seen", torch.rand(1))
    for _ in range(2):
        before = {name: x.clone() for name, x in average.named_parameters()}
        move_towards(average, source, share)
        for name, x in average.named_parameters():
            expected = 0.75 * before[name] + 0.25 * source.get_parameter(name)
            torch.testing.assert_close(x, expected)
        assert torch.equal(average.seen, source.seen)
        source.to(torch.float64).to(torch.float32)  # which may replace what it holds
        average[0].bias = nn.Parameter(torch.zeros(2))
