"""Parameters of members: frozen, tied, drawn anew, not finite."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from member_parts import FC, A, C, D, assert_members_are, flat, inputs
from torch import nn

from layeredrl_torchrl import ProbabilisticEnsemble
from layeredrl_torchrl.models._members import VmapMembers
from layeredrl_torchrl.models._output_checks import check_parameters
from layeredrl_torchrl.nets import StackedProbFCDynamics


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


def test_members_are_named_by_parameters_that_are_not_finite_and_not_by_large_ones():
    weights, biases = torch.full((3, 2, 2), 1e30), torch.zeros(3, 1)  # squares overflow
    check_parameters([weights, biases])
    for broken, value in ((weights, torch.nan), (biases, -torch.inf)):
        before = broken[1].clone()
        broken[1].flatten()[0] = value
        with pytest.raises(ValueError, match=r"member\(s\) \[1\] of 3 have parameters"):
            check_parameters([weights, biases])
        broken[1] = before
