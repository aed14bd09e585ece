"""What is put back after an error, and which states are loaded: of modules and of optimizers."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import make_ensemble
from torch import nn

from layeredrl_torchrl import EncoderNet, IdentityEncoder
from layeredrl_torchrl._state import (
    Snapshot,
    WholeLoading,
    follow_parameters,
    refuse_other_shapes,
    undone_on_error,
)


def step(optim, *parameters):
    for p in parameters:
        p.grad = torch.ones_like(p)
    optim.step()
    optim.zero_grad()


def moments(optim, p):
    return {name: value.clone() for name, value in optim.state[p].items()}


def fail_after(stateful, change):
    with undone_on_error(stateful):
        change()
        return 1 / 0


@pytest.fixture
def trained():
    """Three parameters, of which the first two have moments."""
    parameters = [nn.Parameter(torch.rand(n)) for n in (2, 3, 4)]
    optim = torch.optim.Adam(parameters)
    step(optim, *parameters[:2])
    return optim, parameters


def test_moments_are_put_back_in_place_and_new_ones_dropped(trained):
    optim, parameters = trained
    before = [moments(optim, p) for p in parameters[:2]]
    held = optim.state[parameters[0]]["exp_avg"]
    with pytest.raises(ZeroDivisionError):
        fail_after(optim, lambda: step(optim, *parameters))
    assert set(optim.state) == set(parameters[:2])
    for p, expected in zip(parameters, before, strict=False):
        assert optim.state[p].keys() == expected.keys()
        assert all(torch.equal(optim.state[p][name], x) for name, x in expected.items())
    assert optim.state[parameters[0]]["exp_avg"] is held
    with undone_on_error(optim):
        step(optim, *parameters)
    assert set(optim.state) == set(parameters)  # without an error all stays


def test_a_snapshot_of_some_parameters_leaves_the_moments_of_others(trained):
    optim, (first, second, third) = trained
    snapshot, before = Snapshot(optim, [first]), moments(optim, first)
    step(optim, first, second, third)
    after = {p: moments(optim, p) for p in (second, third)}
    snapshot.restore()
    assert all(torch.equal(optim.state[first][name], x) for name, x in before.items())
    for p, expected in after.items():
        assert all(torch.equal(optim.state[p][name], x) for name, x in expected.items())


def test_a_module_is_put_back_even_if_it_was_broken_before():
    net = IdentityNet()
    net.weight.data.fill_(torch.nan)
    with pytest.raises(ZeroDivisionError):
        fail_after(net, lambda: (net.weight.data.fill_(1.0), net.top.fill_(3.0)))
    assert net.weight.isnan().all()
    assert net.top.isinf().all()


class IdentityNet(WholeLoading):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("top", torch.full((2,), torch.inf))


@pytest.mark.parametrize(
    ("name", "value", "fine"),
    [
        ("top", torch.inf, True),  # a bound, say
        ("top", torch.nan, False),
        ("weight", torch.inf, False),
        ("weight", torch.nan, False),
        ("weight", 2.0, True),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_weights_are_finite_and_nothing_is_nan(name, value, fine, strict):
    net = IdentityNet()
    # The other entry differs, too, so that a load of one by one would be seen.
    state = {key: torch.zeros(2) for key in net.state_dict()} if strict else {}
    state[name] = torch.tensor([1.0, value])
    before = copy.deepcopy(net.state_dict())
    if fine:
        net.load_state_dict(state, strict=strict)
        assert all(torch.equal(x, (before | state)[key]) for key, x in net.state_dict().items())
        return
    with pytest.raises(ValueError, match=rf"IdentityNet has numbers .*\(1 entries: {name}\)"):
        net.load_state_dict(state, strict=strict)
    assert all(torch.equal(x, before[key]) for key, x in net.state_dict().items())


def test_what_is_loaded_in_part_says_which_part():
    net = IdentityNet()
    result = net.load_state_dict({"top": torch.zeros(2), "more": torch.zeros(1)}, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["weight"], ["more"])
    assert net.top.tolist() == [0.0, 0.0]
    assert net.weight.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"top: saved is \(3,\), IdentityNet has \(2,\)"):
        net.load_state_dict({"top": torch.zeros(3)}, strict=False)


def test_nothing_is_saved_that_only_says_where_a_part_computes():
    for part in (EncoderNet((3,), 2, 1), make_ensemble()):
        assert not any("floats" in key for key in part.state_dict())


def other(*sizes, groups=1):
    parts = [nn.Parameter(torch.rand(n)) for n in sizes]
    cut = len(parts) // groups
    optim = torch.optim.Adam([{"params": parts[i * cut : (i + 1) * cut]} for i in range(groups)])
    step(optim, *parts)
    return optim


def spoiled(entry, value):
    state = copy.deepcopy(other(2, 3, 4).state_dict())
    state["state"][1][entry].fill_(value)
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (other(2, 3, 4, 5).state_dict(), "group: the checkpoint has 4 parameters, this one 3"),
        (other(2, 3).state_dict(), "group: the checkpoint has 2 parameters, this one 3"),
        (other(2, 3, 4, groups=3).state_dict(), "the checkpoint has 3 groups, this one 1"),
        (other(2, 5, 4).state_dict(), r"parameter 1 of group: .* has \(5,\), this one \(3,\)"),
        (spoiled("exp_avg", torch.nan), "parameter 1: exp_avg is not finite"),
        (spoiled("step", torch.inf), "parameter 1: step is not finite"),
        ({"state": {}}, "'state'.* is not the state of an optimizer"),
        ({"param_groups": []}, "is not the state of an optimizer"),
    ],
)
def test_another_optimizers_state_is_refused(state, message, trained):
    optim, parameters = trained
    refuse_other_shapes(optim)
    before = [moments(optim, p) for p in parameters[:2]]
    with pytest.raises(ValueError, match=message):
        optim.load_state_dict(state)
    for p, expected in zip(parameters, before, strict=False):
        assert all(torch.equal(optim.state[p][name], x) for name, x in expected.items())
    optim.load_state_dict(other(2, 3, 4).state_dict())
    plain = torch.optim.SGD(parameters)  # which has no moments
    refuse_other_shapes(plain)
    plain.load_state_dict(torch.optim.SGD(parameters).state_dict())


def test_moments_follow_parameters_and_are_left_alone_otherwise(trained):
    optim, parameters = trained
    held = optim.state[parameters[0]]["exp_avg"]
    follow_parameters(optim)
    assert optim.state[parameters[0]]["exp_avg"] is held
    expected = held.double()
    for p in parameters:
        p.data = p.data.double()
    follow_parameters(optim)
    assert torch.equal(optim.state[parameters[0]]["exp_avg"], expected)
    step(optim, *parameters)


def test_parts_without_a_reset_of_their_own_are_reset_as_tensordict_does():
    encoder = EncoderNet((3,), 2, 1)
    before = encoder.state_net.weight.detach().clone()
    assert encoder.reset_parameters_recursive() is None
    assert not torch.equal(encoder.state_net.weight, before)
    with pytest.warns(UserWarning, match="did not find any parameters"):
        assert IdentityEncoder((3,)).reset_parameters_recursive() is None
