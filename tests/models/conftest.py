"""What the tests of the models share: recorded members, hand-written members, a slow twin."""

from __future__ import annotations

import math

import gymnasium as gym
import pytest
import torch
from torch import nn

from layeredrl_torchrl import ProbabilisticEnsemble, ProbFCDynamics

# The fixtures are functions and classes without state: session scope lets hypothesis tests use
# them.


def _box(n):
    return gym.spaces.Box(-math.inf, math.inf, (n,)) if n else None


@pytest.fixture(scope="session")
def box():
    """``box(n)``: an unbounded gymnasium space of n dimensions, None for 0."""
    return _box


class TanhNet(nn.Module):
    """A member somebody wrote: one tanh layer, continuous or discrete actions, any batch shape."""

    def __init__(self, state_space, context_space, action_space, n_modes, hidden=5):
        super().__init__()
        self.d, self.k = state_space.shape[0], n_modes
        self.n = int(action_space.n) if isinstance(action_space, gym.spaces.Discrete) else 0
        c = context_space.shape[0] if context_space is not None else 0
        size = self.d + c + (self.n or action_space.shape[0])
        self.hidden = nn.Linear(size, hidden)
        self.out = nn.Linear(hidden, self.k * (2 * self.d + 1) + 1)

    def forward(self, state, context, action):
        if self.n:
            action = (action.unsqueeze(-1) == torch.arange(self.n)).to(state.dtype)
        out = self.out(torch.tanh(self.hidden(torch.cat((state, context, action), -1))))
        size = self.k * self.d
        mean, log_std, logits, term = out.split([size, size, self.k, 1], -1)
        shape = (*out.shape[:-1], self.k, self.d)
        gaussians = mean.reshape(shape), (0.5 * log_std).exp().reshape(shape)
        return gaussians, logits.softmax(-1), term.squeeze(-1).sigmoid()


class OpaqueNet(TanhNet):
    """The same with a branch on values, which torch.vmap cannot follow."""

    def forward(self, state, context, action):
        sign = 1.0 if float(state.sum()) < math.inf else -1.0
        (mean, std), weights, term_prob = super().forward(state, context, action)
        return (sign * mean, std), weights, term_prob


class TableNet(nn.Module):
    """Predicts one and the same mixture everywhere; it has no parameter."""

    def __init__(self, mean, std, weights=None, term_prob=0.0):
        super().__init__()
        mean = torch.as_tensor(mean, dtype=torch.get_default_dtype())
        self.register_buffer("mean", mean)  # [K, D]
        self.register_buffer("std", torch.as_tensor(std, dtype=mean.dtype).expand_as(mean).clone())
        weights = [1 / len(mean)] * len(mean) if weights is None else weights
        self.register_buffer("weights", torch.tensor(weights, dtype=mean.dtype))
        self.register_buffer("term_prob", torch.tensor(term_prob, dtype=mean.dtype))

    def forward(self, state, context, action):
        batch = state.shape[:-1]
        return (
            (self.mean.expand(*batch, *self.mean.shape), self.std.expand(*batch, *self.std.shape)),
            self.weights.expand(*batch, -1),
            self.term_prob.expand(batch),
        )


@pytest.fixture(scope="session")
def tanh_net():
    return TanhNet


@pytest.fixture(scope="session")
def opaque_net():
    return OpaqueNet


@pytest.fixture(scope="session")
def table_net():
    return TableNet


@pytest.fixture(scope="session")
def fc():
    """The built-in network, small, with the context as an input and biases that differ."""

    def build(*spaces, **options):
        options = {"hidden_sizes": (6, 6, 5), "ignore_context": False} | options
        net = ProbFCDynamics(*spaces, **options)
        for layer in net.layers:
            nn.init.normal_(layer.bias, std=0.3)
        return net

    return build


@pytest.fixture(scope="session", params=["fc", "tanh"])
def net(request, fc, tanh_net):
    """The built-in network, then the hand-written one."""
    return {"fc": fc, "tanh": tanh_net}[request.param]


@pytest.fixture(scope="session")
def recorded():
    """``ensemble, nets = recorded(net, d=, c=, a=, ...)``: the nets are the members' originals."""

    def build(net, d=3, c=2, a=2, *, action_space=None, n_models=3, n_modes=2, **options):
        nets = []

        def partial_net(*spaces):
            nets.append(net(*spaces))
            return nets[-1]

        ensemble = ProbabilisticEnsemble(
            state_space=_box(d),
            context_space=_box(c),
            action_space=_box(a) if action_space is None else action_space,
            partial_net=partial_net,
            n_models=n_models,
            n_modes=n_modes,
            **{"clip_inputs": False} | options,
        )
        assert len(nets) == n_models
        return ensemble, nets

    return build


@pytest.fixture
def bf16_units(monkeypatch):
    """Pretend that this CPU multiplies bfloat16 faster, so that autocast is followed on any."""
    monkeypatch.setattr("layeredrl_torchrl._precision._pays", lambda *_: True)


@pytest.fixture
def no_bf16_units(monkeypatch):
    """Pretend that it does not."""
    monkeypatch.setattr("layeredrl_torchrl._precision._pays", lambda *_: False)


@pytest.fixture(scope="session")
def tables():
    """``tables([net, ...])``: an ensemble of the given members, all of one K and D."""

    def build(nets, c=0, a=1, **options):
        in_turn = iter(nets)
        k, d = nets[0].mean.shape
        options = {"clip_inputs": False} | options
        return ProbabilisticEnsemble(
            _box(d), _box(c), _box(a), lambda *_: next(in_turn), len(nets), k, **options
        )

    return build


@pytest.fixture(scope="session")
def transitions():
    """``transitions(n, d, c, a)``: state, context, action, next state in units of their own."""

    def draw(n=30, d=3, c=2, a=2, *, discrete=0, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(width):
            scale = 0.1 + 5 * torch.rand(width, generator=generator)
            loc = 4 * torch.randn(width, generator=generator)
            return loc + scale * torch.randn(n, width, generator=generator)

        state = normal(d)
        context = normal(c)
        action = torch.randint(discrete, (n,), generator=generator) if discrete else normal(a)
        return state, context, action, state + 0.3 * normal(d)

    return draw


def column_stats(data):
    """Mean and population standard deviation of each column, in Python floats."""
    columns = data.double().T.tolist()
    loc = [math.fsum(column) / len(column) for column in columns]
    scale = [
        math.sqrt(math.fsum((x - m) ** 2 for x in column) / len(column))
        for column, m in zip(columns, loc, strict=True)
    ]
    return torch.tensor(loc, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64)


@pytest.fixture(scope="session")
def slow_predict():
    """One member at one row, by the definition: loops over modes and dimensions.

    ``sample`` is what ``fit_statistics`` was given, or None; returns lists (mean [K][D],
    std [K][D], weights [K], term_prob).
    """

    def predict(
        net,
        state,
        context,
        action,
        sample=None,
        *,
        predict_delta=True,
        normalize_inputs=True,
        normalize_targets=True,
        clip_inputs=False,
    ):
        inputs = [state, context, action]
        beyond = 0.0  # squared distance from the range of the data, in input stds
        for i, x in enumerate(inputs):
            if sample is None or not (normalize_inputs and x.is_floating_point()):
                continue
            if clip_inputs:  # to the range of the data, a tenth of it wider on both sides
                low, high = sample[i].min(0).values, sample[i].max(0).values
                margin = 0.1 * (high - low)
                bounds = zip((low - margin).tolist(), (high + margin).tolist(), strict=True)
                pairs = zip(x.tolist(), bounds, strict=True)
                kept = torch.tensor([min(max(value, lo), hi) for value, (lo, hi) in pairs])
                if i != 1 or not getattr(net, "ignore_context", False):
                    _, scale = column_stats(sample[i])
                    beyond += sum(((x - kept) / scale).square().tolist())
                x = kept
            loc, scale = column_stats(sample[i])
            inputs[i] = ((x - loc) / scale).to(state.dtype)
        loc, scale = torch.zeros(len(state)), torch.ones(len(state))
        if sample is not None and normalize_targets:
            loc, scale = column_stats(sample[3] - sample[0] if predict_delta else sample[3])
        with torch.no_grad():
            (mean, std), weights, term_prob = net(*inputs)
        means, stds = [], []
        loc, scale, start = loc.tolist(), scale.tolist(), state.tolist()
        for of_mean, of_std in zip(mean.tolist(), std.tolist(), strict=True):
            means.append([])
            stds.append([])
            for d in range(len(state)):
                value = of_mean[d] * scale[d] + loc[d]
                means[-1].append(value + (start[d] if predict_delta else 0.0))
                stds[-1].append((of_std[d] + min(beyond**0.5, 1.0)) * scale[d])
        return means, stds, weights.tolist(), term_prob.item()

    return predict
