"""Loss terms that a user adds to a predictor's."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import LEARN, learn, make_buffer, make_predictor, unchanged
from torch import nn

from layeredrl_torchrl import EncoderNet, ModelTraining, TermsLoss


class Reconstruction(TermsLoss):
    """Decodes the observation that a state was encoded from; the decoder is its own."""

    length = 2

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.decoder = encoder, nn.Linear(2, 2)

    def terms(self, prepared):
        assert prepared.shape[1] == 2
        state, _ = self.encoder(prepared["observation"])
        error = self.decoder(state) - prepared["observation"]
        return {"loss_decoder": error[prepared["valid"]].square().mean(), "decoded": state.mean()}


def build(weights, **options):
    torch.manual_seed(0)
    encoder = EncoderNet((2,), 2, 0)
    predictor = make_predictor(encoder, **options)
    predictor.add_loss(Reconstruction(encoder), weights, lr=0.02)
    return predictor


def test_an_own_term_is_minimised_weighted_and_reported():
    buffer, found = make_buffer(), {}
    for weight in (0.0, 0.5):
        predictor = build({"loss_decoder": weight})
        loss, info = predictor.learn(buffer, **LEARN | {"n_updates": 100})
        parts = info["loss_dynamics"] + 30.0 * info["loss_termination"]
        parts += info["loss_reward"] + info["loss_value"]
        assert loss.item() == pytest.approx(parts + weight * info["loss_decoder"], rel=1e-5)
        found[weight] = info["loss_decoder"]
    assert found[0.5] < 0.5 * found[0.0]


def test_its_parameters_move_by_its_own_gradient_alone():
    predictor = build({"loss_decoder": 0.0}, model_training=ModelTraining(weight_decay=0.5))
    (loss,) = predictor.updates.own_losses
    with unchanged(loss.decoder):
        learn(predictor, make_buffer())


def test_its_parameters_are_saved_copied_and_kept_apart():
    predictor, buffer = build({"loss_decoder": 1.0}), make_buffer()
    learn(predictor, buffer)
    resumed = build({"loss_decoder": 1.0})
    resumed.load_state_dict(predictor.state_dict())
    resumed.optim.load_state_dict(copy.deepcopy(predictor.optim.state_dict()))
    found = []
    for one in (predictor, resumed, copy.deepcopy(resumed)):
        torch.manual_seed(1)
        found.append(learn(one, buffer))
    assert found[0] == found[1] == found[2]


def test_a_term_without_a_weight_is_refused():
    predictor = build({"loss_decode": 1.0})
    with unchanged(predictor), pytest.raises(ValueError, match=r"loss_decoder.*no weight"):
        learn(predictor, make_buffer())


@pytest.mark.parametrize("weight", [-1.0, float("nan"), "1"])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises((TypeError, ValueError), match=r"weight of loss_decoder"):
        build({"loss_decoder": weight})
