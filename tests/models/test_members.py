"""All ways of evaluating members together against each member called on its own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from layeredrl_torchrl import ProbabilisticEnsemble, ProbFCDynamics
from layeredrl_torchrl.models._members import LoopMembers, VmapMembers
from layeredrl_torchrl.models._output_checks import check_parameters
from layeredrl_torchrl.nets import StackedProbFCDynamics

D, C, A = 3, 2, 2


def inputs(n_models, n=4, d=D, c=C, a=A, dtype=torch.float32):
    return tuple(torch.randn(n_models, n, k, dtype=dtype) for k in (d, c, a))


def flat(out):
    (mean, std), weights, term_prob = out
    return mean, std, weights, term_prob


def assert_members_are(members, nets, given):
    """Row block m of every output is what net m says of row block m."""
    got = flat(members(*given))
    for m, net in enumerate(nets):
        for x, y in zip(got, flat(net(*(g[m] for g in given))), strict=True):
            assert x.dtype == y.dtype
            torch.testing.assert_close(x[m], y)


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


def test_the_fastest_way_that_fits(fc, tanh_net, table_net, recorded, tables):
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


def test_members_are_named_by_parameters_that_are_not_finite_and_not_by_large_ones():
    weights, biases = torch.full((3, 2, 2), 1e30), torch.zeros(3, 1)  # squares overflow
    check_parameters([weights, biases])
    for broken, value in ((weights, torch.nan), (biases, -torch.inf)):
        before = broken[1].clone()
        broken[1].flatten()[0] = value
        with pytest.raises(ValueError, match=r"member\(s\) \[1\] of 3 have parameters"):
            check_parameters([weights, biases])
        broken[1] = before


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


FC = partial(ProbFCDynamics, ignore_context=False)


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


# -- what parameters are --------------------------------------------------------------------


class Tied(nn.Module):
    """Uses one weight in two layers."""

    def __init__(self, *_):
        super().__init__()
        self.linear, self.again = nn.Linear(D, D), nn.Linear(D, D)
        self.again.weight = self.linear.weight

    def forward(self, state, context, action):
        mean = self.again(torch.tanh(self.linear(state))).unsqueeze(-2)
        ones = torch.ones_like(state[..., 0])
        return (mean, torch.ones_like(mean)), ones.unsqueeze(-1), 0 * ones


def tied_fc(*spaces):
    net = FC(*spaces, hidden_sizes=(4, 4, 4))
    net.layers[2].weight = net.layers[1].weight
    return net


def frozen(net, part):
    net.get_submodule(part).requires_grad_(False)
    return net


def step(members):
    """Take a gradient step, of what is trained, for two members."""
    optim = torch.optim.SGD([p for p in members.parameters() if p.requires_grad], 0.1)
    sum(out.square().sum() for out in flat(members(*inputs(2)))).backward()
    optim.step()


@pytest.mark.parametrize(
    ("net", "part", "name", "kind"),
    [
        (partial(FC, hidden_sizes=(4,)), "layers.0", "weights.0", StackedProbFCDynamics),
        (partial(FC, hidden_sizes=(4,)), "layers.0", "biases.0", StackedProbFCDynamics),
        ("tanh_net", "hidden", "params.hidden.weight", VmapMembers),
    ],
)
def test_what_is_frozen_in_all_members_stays_frozen_and_they_run_together(
    net, part, name, kind, box, request
):
    net = request.getfixturevalue(net) if isinstance(net, str) else net
    spaces = box(D), box(C), box(A)
    model = ProbabilisticEnsemble(*spaces, lambda *s: frozen(net(*s), part), 2)
    assert isinstance(model.members, kind)
    before = {key: value.clone() for key, value in model.members.state_dict().items()}
    step(model.members)
    after = model.members.state_dict()
    still = {key for key in before if torch.equal(before[key], after[key])}
    assert name in still
    assert len(still) == len(before) // 2  # weight and bias of one of two layers


@pytest.mark.parametrize("net", [partial(FC, hidden_sizes=(4,)), "tanh_net"])
def test_a_frozen_member_does_not_freeze_the_others(net, box, request):
    net = request.getfixturevalue(net) if isinstance(net, str) else net
    nets = []

    def partial_net(*spaces):
        nets.append(net(*spaces).requires_grad_(bool(nets)))
        return nets[-1]

    members = ProbabilisticEnsemble(box(D), box(C), box(A), partial_net, 2).members
    given = inputs(2)
    before = flat(members(*given))
    step(members)
    after = flat(members(*given))
    assert torch.equal(before[0][0], after[0][0])
    assert not torch.equal(before[0][1], after[0][1])


@pytest.mark.parametrize(
    ("net", "one", "two"),
    [(Tied, "linear", "again"), (tied_fc, "layers.1", "layers.2")],
    ids=["own", "built-in"],
)
def test_weights_that_are_tied_stay_tied(net, one, two, box):
    nets = []

    def partial_net(*spaces):
        nets.append(net(*spaces))
        return nets[-1]

    ensemble = ProbabilisticEnsemble(box(D), box(C), box(A), partial_net, 2)
    step(ensemble.members)
    assert_members_are(ensemble.members, nets, inputs(2))
    for member in ensemble.members.nets:
        assert member.get_submodule(one).weight is member.get_submodule(two).weight
    ensemble.update_average()
    average = ensemble.averaged_members.nets[0]
    assert average.get_submodule(one).weight is average.get_submodule(two).weight


class Doubling(nn.Module):
    """Has a ``reset_parameters`` of its own beside those of its parts, and a buffer."""

    def __init__(self, *_):
        super().__init__()
        self.linear, self.norm = nn.Linear(D, D), nn.BatchNorm1d(D)
        self.offset = nn.Parameter(torch.zeros(D))

    def reset_parameters(self):
        nn.init.constant_(self.offset, 2.0)
        self.linear.weight.data.mul_(2.0)  # of what the layer drew

    def forward(self, state, context, action):
        mean = (self.norm(self.linear(state)) + self.offset).unsqueeze(-2)
        ones = torch.ones_like(state[..., 0])
        return (mean, torch.ones_like(mean)), ones.unsqueeze(-1), 0 * ones


@pytest.mark.parametrize("second", [Doubling, "tanh_net"], ids=["vmap", "loop"])
def test_own_networks_are_drawn_anew(second, box, request):
    """Each member by itself, its parts before itself, and running statistics with it."""
    torch.manual_seed(0)
    second = request.getfixturevalue(second) if isinstance(second, str) else second
    spaces = box(D), box(C), box(A)
    builders = iter([Doubling, second])
    model = ProbabilisticEnsemble(*spaces, lambda *_: next(builders)(*spaces, 1), 2)
    model.members(*inputs(2))  # the running statistics move
    before = {key: value.clone() for key, value in model.members.state_dict().items()}
    model.reset_parameters()
    after = model.members.state_dict()
    prefix = "params." if isinstance(model.members, VmapMembers) else "nets.0."
    shape = (2, D) if isinstance(model.members, VmapMembers) else (D,)
    for name, value in (("offset", 2.0), ("norm.running_mean", 0.0), ("norm.running_var", 1.0)):
        assert torch.equal(after[prefix + name], torch.full(shape, value))
    weight = after[prefix + "linear.weight"]
    assert not (weight == before[prefix + "linear.weight"]).any()
    assert weight.abs().max() > D**-0.5  # the bound of the layer's own draw
    assert weight.abs().max() < 2 * D**-0.5
    if isinstance(model.members, VmapMembers):
        assert not (weight[0] == weight[1]).any()
    average = model.averaged_members.state_dict()
    assert all(torch.equal(average[key], value) for key, value in after.items())


class Spectral(nn.Module):
    """Has a layer that ``torch.vmap`` can evaluate, but not train."""

    def __init__(self, *_):
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(D, D))

    def forward(self, state, context, action):
        mean = self.linear(state).unsqueeze(-2)
        ones = torch.ones_like(state[..., 0])
        return (mean, torch.ones_like(mean)), ones.unsqueeze(-1), 0 * ones


def test_members_that_cannot_be_trained_together_take_turns(box):
    with pytest.warns(UserWarning, match=r"Spectral cannot run under torch\.vmap"):
        model = ProbabilisticEnsemble(box(D), box(C), box(A), Spectral, 2)
    step(model.train().members)
    model.update_average()
    model.predict(torch.zeros(2, D), torch.zeros(2, C), torch.zeros(2, A))


def test_trying_members_out_changes_no_buffers(box):
    model = ProbabilisticEnsemble(box(D), box(C), box(A), Doubling, 2)
    assert isinstance(model.members, VmapMembers)
    assert not model.members.state_dict()["params.norm.num_batches_tracked"].any()
