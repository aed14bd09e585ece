"""All ways of evaluating members together against each member called on its own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from member_parts import FC, A, C, D, assert_members_are, flat, inputs
from torch import nn

from layeredrl_torchrl import ProbabilisticEnsemble, ProbFCDynamics
from layeredrl_torchrl.models._members import LoopMembers, VmapMembers
from layeredrl_torchrl.nets import StackedProbFCDynamics


class WithBuffer(nn.Module):
    """A member that differs from the others in buffers, one of them not saved."""

    def __init__(self, drift, scale):
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.register_buffer("drift", torch.full((D,), drift))
        self.register_buffer("scale", torch.tensor(scale), persistent=False)

    def forward(self, state, context, action):
        mean = (self.linear(state) * self.scale + self.drift).unsqueeze(-2)
        ones = torch.ones_like(state[..., 0])
        return (mean, torch.ones_like(mean)), ones.unsqueeze(-1), 0 * ones


# -- which way is taken --------------------------------------------------------------------


def test_members_run_together_by_the_fastest_way_that_fits(
    fc, tanh_net, table_net, recorded, tables
):
    assert isinstance(recorded(fc)[0].members, StackedProbFCDynamics)
    for dtype in (torch.float32, torch.float64):
        ensemble, nets = recorded(lambda *spaces: tanh_net(*spaces).to(dtype))  # noqa: B023
        assert isinstance(ensemble.members, VmapMembers)
        assert_members_are(ensemble.members, nets, inputs(3, dtype=dtype))
    table = tables([table_net([[0.0]], 1.0), table_net([[1.0]], 1.0)])
    assert isinstance(table.members, LoopMembers)


def test_members_that_cannot_run_together_take_turns_and_say_so(opaque_net, recorded):
    with pytest.warns(UserWarning, match=r"OpaqueNet cannot run under torch\.vmap"):
        ensemble, nets = recorded(opaque_net)
    assert isinstance(ensemble.members, LoopMembers)
    assert_members_are(ensemble.members, nets, inputs(3))


@pytest.mark.parametrize("kind", ["fc", "tanh_net"])
def test_one_network_for_all_members_is_refused(kind, box, request):
    spaces = box(D), None, box(A)
    net = request.getfixturevalue(kind)(*spaces, 1)
    with pytest.raises(ValueError, match=r"members 0 and 1 that share .*could not disagree"):
        ProbabilisticEnsemble(*spaces, partial_net=lambda *_: net, n_models=3)
    ProbabilisticEnsemble(*spaces, partial_net=lambda *_: net, n_models=1)
    net.requires_grad_(False)  # what is not trained may be shared
    ProbabilisticEnsemble(*spaces, partial_net=lambda *_: net, n_models=2)


def test_defaults_are_those_that_are_documented(box):
    """What an ensemble is by default decides what anybody's model learns."""
    model = ProbabilisticEnsemble(box(D), box(C), box(A))
    sizes = model.n_models, model.n_modes, model.n_particles_per_model
    assert (sizes, model.ema_decay) == ((5, 1, 1), 0.99)
    units = model.scaling
    flags = units.predict_delta, units.normalize_inputs, units.normalize_targets, units.clip
    assert flags == (True, True, True, True)
    assert not ProbabilisticEnsemble(*[box(D)] * 3, normalize_inputs=False).scaling.clip
    widths = [weight.shape[1:] for weight in model.members.weights]
    assert widths == [(D + A, 128), (128, 128), (128, 2 * D + 2)]  # without the context
    assert isinstance(model.members.activation, nn.Hardswish)
    low, high = (model.members.log_std_bounds(torch.tensor(x)) for x in (-1e9, 1e9))
    assert (low.item(), high.item()) == (-6.0, 1.0)


# -- members that differ -------------------------------------------------------------------


class Subclass(ProbFCDynamics):
    """A user's variation of the built-in network."""

    def forward(self, state, context, action):
        (mean, std), weights, term_prob = super().forward(state, context, action)
        return (mean + 10 * state.unsqueeze(-2), std), weights, term_prob


class Activated(nn.Module):
    """Members of one class and equal parameter shapes that differ in a plain attribute."""

    def __init__(self, activation, offset=0.0):
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.activation = activation
        self.offset = offset

    def forward(self, state, context, action):
        mean = (self.activation(self.linear(state)) + self.offset).unsqueeze(-2)
        ones = torch.ones_like(state[..., 0])
        return (mean, torch.ones_like(mean)), ones.unsqueeze(-1), 0 * ones


with_slopes = partial(FC, hidden_sizes=(4,), nonlinearity=nn.PReLU)


def with_random_slopes(*spaces):
    net = with_slopes(*spaces)
    nn.init.uniform_(net.activation.weight, 0.0, 1.0)
    return net


DIFFERENT = {
    "widths": [partial(FC, hidden_sizes=(h,)) for h in (4, 5, 6)],
    "depths": [partial(FC, hidden_sizes=(4,) * depth) for depth in (1, 2, 3)],
    "activations": [
        partial(FC, hidden_sizes=(4,), nonlinearity=f) for f in (nn.SiLU, nn.Tanh, nn.ReLU)
    ],
    "bounds of the std": [
        partial(FC, hidden_sizes=(4,), log_std_bounds=bounds)
        for bounds in ((-7.0, 2.0), (-7.0, -3.0), (-1.0, 2.0))
    ],
    "use of the context": [
        partial(ProbFCDynamics, hidden_sizes=(4,), ignore_context=flag)
        for flag in (True, False, True)
    ],
    "slopes of a learned activation": [with_random_slopes] * 3,
    "slopes that are still equal": [with_slopes] * 3,
    "a subclass": [partial(Subclass, ignore_context=False)] * 3,
    "a subclass among others": [FC, partial(Subclass, ignore_context=False), FC],
    "functions": [
        lambda *_: Activated(torch.tanh),
        lambda *_: Activated(torch.relu),
        lambda *_: Activated(torch.sin),
    ],
    "submodules": [
        lambda *_: Activated(nn.Tanh()),
        lambda *_: Activated(nn.ReLU()),
        lambda *_: Activated(nn.SiLU()),
    ],
    "plain numbers": [lambda *_, m=m: Activated(torch.tanh, offset=10.0 * m) for m in range(3)],
    "buffers": [lambda *_, m=m: WithBuffer(float(m), 1.0 + m) for m in range(3)],
    "classes": [lambda *_: Activated(torch.tanh), lambda *_: WithBuffer(3.0, 2.0), FC],
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_members_that_differ_stay_themselves(kind, box):
    builders, nets = iter(DIFFERENT[kind]), []

    def partial_net(*spaces):
        nets.append(next(builders)(*spaces))
        return nets[-1]

    ensemble = ProbabilisticEnsemble(box(D), box(C), box(A), partial_net, n_models=3)
    assert_members_are(ensemble.members, nets, inputs(3))
    count = sum(p.numel() for p in ensemble.members.parameters())
    assert count == sum(p.numel() for net in nets for p in net.parameters())


@pytest.mark.parametrize("ignored", [True, False])
@pytest.mark.parametrize("hidden", [(4, 4, 4), (4, 5, 6)])
def test_a_context_that_no_member_reads_may_lie_far_from_the_data(ignored, hidden, box):
    widths = iter(hidden)

    def partial_net(*spaces):
        return ProbFCDynamics(*spaces, hidden_sizes=(next(widths),), ignore_context=ignored)

    ensemble = ProbabilisticEnsemble(
        box(D), box(C), box(A), partial_net, n_models=3, clip_inputs=True
    )
    state, context, action = (torch.rand(50, k) for k in (D, C, A))
    ensemble.fit_statistics(state, context, action, state + 0.1 * torch.rand(50, D))
    for far in torch.eye(C) * 100:
        near, away = (ensemble.predict(state, x, action)[2] for x in (context, context + far))
        assert torch.equal(near, away) == ignored


def with_dropout(*_):
    return Activated(nn.Dropout(0.5), offset=1.0)


def with_another_offset(*_):
    return Activated(nn.Dropout(0.5), offset=2.0)


@pytest.mark.parametrize("second", [with_dropout, with_another_offset, FC])
def test_a_new_ensemble_is_in_training_mode(second, box):
    """Also after the members were tried out."""
    builders = iter([with_dropout, second])
    spaces = box(D), box(C), box(A)
    ensemble = ProbabilisticEnsemble(*spaces, lambda *_: next(builders)(*spaces, 1), 2)
    assert all(part.training for part in ensemble.modules())


@pytest.mark.parametrize("second", [with_dropout, FC], ids=["vmap", "loop"])
def test_train_and_eval_reach_the_members(second, box):
    builders = iter([with_dropout, second])
    spaces = box(D), box(C), box(A)
    ensemble = ProbabilisticEnsemble(*spaces, lambda *_: next(builders)(*spaces, 1), 2)
    given = inputs(2, n=50)
    one, two = (flat(ensemble.train().members(*given))[0] == 1.0 for _ in range(2))
    assert 0.2 < one[0].float().mean() < 0.8
    assert not torch.equal(one[0], two[0])
    assert not torch.equal(one[0], one[1])  # members draw masks of their own
    one, two = (flat(ensemble.eval().members(*given))[0] for _ in range(2))
    assert torch.equal(one, two)
