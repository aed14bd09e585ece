"""Predictions from averaged weights: the average in a loop, and when it counts."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from layeredrl_torchrl import IdentityEncoder, ProbabilisticEnsemble, StaticPredictor


def inputs():
    return torch.randn(4, 3), torch.randn(4, 2), torch.randn(4, 2)


def train(ensemble):
    """What an optimiser does to the weights, seen from here."""
    with torch.no_grad():
        for parameter in ensemble.members.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def weights_of(ensemble):
    return {name: x.clone() for name, x in ensemble.members.state_dict().items()}


@pytest.mark.parametrize("decay", [0.0, 0.15, 0.99])
def test_predictions_come_from_the_average_of_the_weights(decay, net, recorded):
    ensemble, _ = recorded(net, ema_decay=decay)
    plain, _ = recorded(net, ema_decay=None)
    plain.update_average()  # of which it has none
    assert len([*plain.parameters()]) == len([*plain.members.parameters()])
    average = weights_of(ensemble)
    given = inputs()
    for t in range(15):
        train(ensemble)
        ensemble.update_average()
        keep = min(decay, (1 + t) / (10 + t))
        for name, x in weights_of(ensemble).items():
            average[name] = keep * average[name] + (1 - keep) * x
        plain.members.load_state_dict(average)
        for x, y in zip(ensemble.predict(*given), plain.predict(*given), strict=True):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    # the weights under training are elsewhere, unless nothing is kept of the past
    plain.members.load_state_dict(weights_of(ensemble))
    same = torch.allclose(ensemble.predict(*given)[0], plain.predict(*given)[0], atol=1e-4)
    assert same is (decay == 0.0)


def test_every_call_uses_the_average_once_there_is_one(net, recorded):
    ensemble, _ = recorded(net)
    state, context, action = inputs()
    td = TensorDict({"state": state, "context": context, "action": action}, batch_size=(4,))
    actions = action.unsqueeze(1)

    def everything():
        torch.manual_seed(3)
        return [
            *ensemble.predict(state, context, action),
            ensemble(td.clone())["next", "state"],
            ensemble.dist(td).log_prob(state),
            ensemble.get_log_prob(state, context, action, state)[0],
            ensemble.rollout(state, context, actions)["next", "state"],
            ensemble.rollout(state, context, actions, deterministic=True)["next", "state"],
        ]

    before = everything()
    train(ensemble)
    assert not any(torch.allclose(x, y) for x, y in zip(everything(), before, strict=True))
    ensemble.update_average()
    before = everything()
    train(ensemble)
    assert all(torch.equal(x, y) for x, y in zip(everything(), before, strict=True))
    trained = {id(p) for p in ensemble.parameters() if p.requires_grad}
    assert trained == {id(p) for p in ensemble.members.parameters()}


def through_a_file(ensemble, recorded, net, path):
    """As a part of something else, since that is how models are saved."""
    fresh, _ = recorded(net)
    torch.save(nn.ModuleDict({"model": ensemble}).state_dict(), path / "model.pt")
    state = torch.load(path / "model.pt", weights_only=True)
    nn.ModuleDict({"model": fresh}).load_state_dict(state)
    return fresh


@pytest.mark.parametrize("copied", [False, True])
def test_the_average_is_saved_and_copied_and_goes_on_by_itself(copied, net, recorded, tmp_path):
    ensemble, _ = recorded(net)
    for _ in range(3):
        train(ensemble)
        ensemble.update_average()
    given = inputs()
    expected = ensemble.predict(*given)[0]
    twin = copy.deepcopy(ensemble) if copied else through_a_file(ensemble, recorded, net, tmp_path)
    assert torch.equal(twin.predict(*given)[0], expected)
    torch.manual_seed(1)
    train(twin)
    twin.update_average()
    assert torch.equal(ensemble.predict(*given)[0], expected)
    torch.manual_seed(1)
    train(ensemble)
    ensemble.update_average()
    assert torch.equal(twin.predict(*given)[0], ensemble.predict(*given)[0])
    assert not torch.allclose(twin.predict(*given)[0], expected)


def test_loading_a_state_without_an_average_ends_the_averaging(net, recorded):
    ensemble, _ = recorded(net)
    fresh = copy.deepcopy(ensemble)
    given = inputs()
    expected = fresh.predict(*given)[0]
    train(ensemble)
    ensemble.update_average()
    ensemble.load_state_dict(fresh.state_dict())
    assert torch.equal(ensemble.predict(*given)[0], expected)
    train(ensemble)
    assert not torch.allclose(ensemble.predict(*given)[0], expected)


def test_members_without_parameters_have_nothing_to_average(table_net, tables):
    ensemble = tables([table_net([[1.0]], 1.0), table_net([[2.0]], 1.0)])
    given = torch.zeros(1), None, torch.zeros(1)
    before = ensemble.predict(*given)[0]
    ensemble.update_average()
    assert torch.equal(ensemble.predict(*given)[0], before)


@pytest.mark.parametrize("whole", [False, True])
def test_an_ensemble_begins_anew(whole, box):
    """By itself, or as a part of a predictor."""
    ensemble = ProbabilisticEnsemble(box(3), None, box(2), n_models=3)
    with torch.no_grad():
        for p in ensemble.parameters():
            p.fill_(7.0)
        for x in ensemble.calibration.buffers():
            x.add_(0.5)
    ensemble.update_average()
    part = StaticPredictor(ensemble, None, None, IdentityEncoder((3,)), 3) if whole else ensemble
    part.reset_parameters_recursive()
    new = ProbabilisticEnsemble(box(3), None, box(2), n_models=3)
    for found, expected in zip(ensemble.parameters(), new.parameters(), strict=True):
        torch.testing.assert_close(found.std(), expected.std(), rtol=0.2, atol=1e-6)
        assert found.abs().max() < 7.0
    for name in ("shift", "slope", "spread", "disagreement"):
        found, expected = (getattr(x.calibration, name) for x in (ensemble, new))
        assert torch.equal(found, expected)
    assert ensemble.n_averaged == 0
    given = torch.randn(4, 3), None, torch.randn(4, 2)
    mean = ensemble.predict(*given)[0]
    moved = copy.deepcopy(ensemble)
    train(moved)  # before there is an average again, predictions come from the weights
    assert not torch.allclose(moved.predict(*given)[0], mean)
    ensemble.update_average()  # of weights that have not moved since
    torch.testing.assert_close(ensemble.predict(*given)[0], mean)
