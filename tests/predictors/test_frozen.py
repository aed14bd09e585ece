"""Parts that the user has frozen stay as they are: weights, statistics, averages, calibration."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import (
    learn,
    make_buffer,
    make_predictor,
    make_transitions,
    moved,
    parameters,
    unchanged,
)
from torch import nn

from layeredrl_torchrl import EncoderNet, StaticPredictor
from layeredrl_torchrl.nets import ModuleEncoder
from layeredrl_torchrl.objectives import ConsistencyLoss

PARTS = ["model", "rew_func", "val_func", "encoder"]


def elsewhere():
    """A buffer whose observations and rewards lie far from those of ``make_buffer()``."""
    data = make_transitions(200)
    for td in (data, data["next"]):
        td["observation"] = 5.0 + 0.1 * td["observation"]
    data["next", "reward"] = 40.0 + 7.0 * data["next", "reward"]
    return make_buffer(data)


def learned(**options):
    torch.manual_seed(0)
    predictor = make_predictor(EncoderNet((2,), 2, 0), holdout_share=0.5, **options)
    data = make_transitions()
    data["observation"][:, 1] = data["next", "observation"][:, 1] = 0.5  # so the mask has a gap
    predictor.learn(make_buffer(data), 5, 8, 8, 0)
    return predictor


@pytest.mark.parametrize("name", PARTS)
def test_a_frozen_part_keeps_everything_and_the_others_learn(name):
    predictor = learned()
    getattr(predictor, name).requires_grad_(False)
    others = [getattr(predictor, other) for other in PARTS if other != name]
    before = [copy.deepcopy(part.state_dict()) for part in others]
    with unchanged(getattr(predictor, name)):
        learn(predictor, elsewhere(), n_updates=201)  # after which it is calibrated
    for part, old in zip(others, before, strict=True):
        same = [key for key, value in part.state_dict().items() if torch.equal(value, old[key])]
        # What depends on nothing that has changed.
        kept = ("offsets", "context", "action", "masked")
        assert all(any(word in key for word in kept) for key in same), same


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_a_frozen_last_layer_is_not_rescaled(which):
    predictor = learned()
    heads = predictor.rew_func, predictor.val_func
    for head in heads:
        getattr(head.net[-1], which).requires_grad_(False)
    before = [getattr(head.net[-1], which).clone() for head in heads]
    learn(predictor, elsewhere())
    for head, old in zip(heads, before, strict=True):
        assert torch.equal(getattr(head.net[-1], which), old)
        assert head.inputs.loc[0] > 1.0  # whereas the layers before it follow the data


def test_a_model_is_fitted_as_long_as_a_member_learns():
    predictor = learned()
    predictor.model.members.biases[0].requires_grad_(False)
    before = predictor.model.scaling.target.loc.clone()
    learn(predictor, elsewhere())
    assert not torch.equal(predictor.model.scaling.target.loc, before)


@pytest.mark.parametrize("name", ["model", "rew_func", "val_func"])
def test_a_part_that_learns_later_gets_its_statistics_then(name):
    """Of data that has not changed since those of the others were taken."""
    buffer = elsewhere()
    predictor = make_predictor()
    part = getattr(predictor, name)
    part.requires_grad_(False)
    learn(predictor, buffer)
    normalizer = part.scaling.state if name == "model" else part.inputs
    assert normalizer.loc.tolist()[:2] == [0.0, 0.0]
    (part.members if name == "model" else part).requires_grad_(True)
    learn(predictor, buffer)
    assert (normalizer.loc[:2] - 5.0).abs().max() < 0.1


def test_a_frozen_encoder_without_a_mask_gets_one():
    """A random projection is fine, and without a mask it would be 0."""
    predictor = make_predictor(EncoderNet((2,), 2, 0))
    predictor.encoder.requires_grad_(False)
    learn(predictor, make_buffer())
    assert predictor.encoder.mask.all()


class Drift(nn.Module):
    """Known dynamics: the normalised change is one half, in each dimension."""

    def __init__(self, state_space, context_space, action_space, n_modes):
        super().__init__()

    def forward(self, state, context, action):
        one = torch.ones_like(state).unsqueeze(-2)
        return (0.5 * one, one), one[..., 0], 0.0 * state[..., 0]


def test_known_dynamics_are_fitted_as_ever():
    """They have nothing to train, and nothing that is frozen."""
    data = make_transitions(200)
    data["observation"] = data["observation"] + 5.0
    predictor = make_predictor(
        model={"partial_net": Drift}, holdout_share=0.5, consistency_loss_weight=0.0, beta_nll=0.0
    )
    learn(predictor, make_buffer(data), n_updates=200)
    assert (predictor.model.scaling.state.loc - 5.0).abs().max() < 1.0
    assert predictor.model.calibration.shift.abs().min() > 0.0


class Ends(nn.Module):
    """A known termination, with weights."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, state, context, action):
        return self.layer(state).squeeze(-1).sigmoid()


def begin_anew(predictor):
    """Every part by itself, which reaches what is frozen as the whole does."""
    predictor.reset_parameters_recursive()
    predictor.predictor_loss.reset_parameters_recursive()
    predictor.model_loss.reset_parameters_recursive()


def test_parts_that_nobody_trains_stay_when_the_others_begin_anew():
    torso = nn.Linear(2, 4).requires_grad_(False)
    encoder = ModuleEncoder(nn.Sequential(torso, nn.Tanh(), nn.Linear(4, 2)), (2,), 2)
    predictor = make_predictor(encoder, term_func=Ends().requires_grad_(False))
    head, members = predictor.rew_func.net[0], predictor.model.members
    head.requires_grad_(False)
    members.weights[0].requires_grad_(False)
    learn(predictor, make_buffer())
    frozen = [predictor.term_func, torso, head]
    before, first = parameters(predictor), members.weights[0].clone()
    with unchanged(*frozen):
        begin_anew(predictor)
    assert torch.equal(members.weights[0], first)
    trained = {name for name, p in predictor.named_parameters() if p.requires_grad}
    assert trained <= moved(predictor, before) | {"rew_func.net.1.weight", "rew_func.net.1.bias"}


def test_what_is_given_keeps_its_frozen_parts_too():
    made = make_predictor()
    args = made.model, made.val_func, made.rew_func, made.encoder, 2
    static = StaticPredictor(*args, term_func=Ends())
    static.term_func.requires_grad_(False)
    static.model.requires_grad_(False)
    nn.init.ones_(static.rew_func.net[-1].weight)
    with unchanged(static.term_func, static.model):
        static.reset_parameters_recursive()
    assert not static.rew_func.net[-1].weight.any()


def test_targets_follow_what_begins_anew():
    encoder = EncoderNet((2,), 2, 0)
    predictor = make_predictor(encoder)
    loss = ConsistencyLoss(encoder, predictor.model, tau=0.01)
    predictor.add_loss(loss, {"loss_consistency": 1.0})
    learn(predictor, make_buffer())
    before = encoder.state_net.weight.clone()
    predictor.reset_parameters()
    assert not torch.equal(encoder.state_net.weight, before)
    for target, source in (
        (loss.target_encoder, encoder),
        (predictor.target_val_func, predictor.val_func),
        (predictor.model.averaged_members, predictor.model.members),
    ):
        torch.testing.assert_close(target.state_dict(), source.state_dict(), rtol=0, atol=0)
    nn.init.ones_(encoder.state_net.weight)
    loss.reset_parameters_recursive()
    assert loss.target_encoder.state_net.weight.eq(1.0).all()
