"""Encoders that nothing trains, and losses that would need them to learn, or to stand still."""

from __future__ import annotations

import warnings

import pytest
from helpers import learn, make_buffer, make_predictor
from torch import nn

from layeredrl_torchrl import EarlyStopping, EncoderNet, ModelTraining, PredictorLoss, TermsLoss
from layeredrl_torchrl.objectives import ConsistencyLoss


class Reconstruction(TermsLoss):
    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.decoder = encoder, nn.Linear(2, 2)

    def terms(self, prepared):
        state, _ = self.encoder(prepared["observation"])
        return {"loss_decoder": (self.decoder(state) - prepared["observation"]).square().mean()}


def still(**options):
    return make_predictor(EncoderNet((2,), 2, 0), learn_encoder=False, **options)


def test_an_empty_mask_that_nobody_fills_is_warned_of():
    with pytest.warns(UserWarning, match=r"mask is empty.*update_mask"):
        learn(still(), make_buffer())
    predictor = still()
    predictor.encoder.mask[0] = True
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        learn(predictor, make_buffer())
    assert predictor.encoder.mask.tolist() == [True, False]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_consistency_loss_whose_encoder_nothing_trains_is_refused(frozen):
    encoder = EncoderNet((2,), 2, 0).requires_grad_(not frozen)
    predictor = make_predictor(encoder, learn_encoder=frozen)
    loss = ConsistencyLoss(encoder, predictor.model, tau=0.5)
    with pytest.raises(ValueError, match=r"nothing here updates that encoder.*learn_encoder=True"):
        predictor.add_loss(loss, {"loss_consistency": 1.0})
    predictor.add_loss(loss, {"loss_consistency": 0.0})  # is only reported
    if not frozen:  # another loss may train it
        predictor.add_loss(Reconstruction(encoder), {"loss_decoder": 1.0})
        predictor.add_loss(ConsistencyLoss(encoder, predictor.model), {"loss_consistency": 1.0})


def test_states_move_with_an_encoder_that_an_own_loss_trains():
    predictor = still()
    assert not predictor._states_move
    predictor.add_loss(Reconstruction(predictor.encoder), {"loss_decoder": 1.0})
    assert predictor._states_move
    learn(predictor, make_buffer())
    assert predictor.encoder.mask.all()
    predictor.encoder.requires_grad_(False)
    assert not predictor._states_move


def test_early_stopping_refuses_a_loss_that_trains_the_encoder():
    options = {
        "holdout_share": 0.5,
        "model_training": ModelTraining(early_stopping=EarlyStopping()),
    }
    predictor = still(**options)
    n_groups = len(predictor.optim.param_groups)
    with pytest.raises(ValueError, match=r"early_stopping.*Reconstruction trains the encoder"):
        predictor.add_loss(Reconstruction(predictor.encoder), {"loss_decoder": 1.0})
    assert len(predictor.optim.param_groups) == n_groups
    # This one only reads it.
    read = PredictorLoss(predictor.encoder, None, None, learn_encoder=False)
    predictor.add_loss(read, {"loss_reward": 1.0})
    predictor.encoder.requires_grad_(False)
    predictor.add_loss(Reconstruction(predictor.encoder), {"loss_decoder": 1.0})
    assert not predictor._states_move
