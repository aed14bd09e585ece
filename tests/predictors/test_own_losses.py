"""Loss terms that a user adds to a predictor's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from layeredrl_torchrl import EncoderNet, TermsLoss

LEARN = {"n_updates": 3, "batch_size": 8, "model_batch_size": 8, "n_total_env_steps": 60}


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


def build(make_predictor, weights, **options):
    torch.manual_seed(0)
    encoder = EncoderNet((2,), 2, 0)
    predictor = make_predictor(encoder, **options)
    predictor.add_loss(Reconstruction(encoder), weights, lr=0.02)
    return predictor


def test_an_own_term_is_minimised_weighted_and_reported(make_predictor, make_buffer):
    buffer, found = make_buffer(), {}
    for weight in (0.0, 0.5):
        predictor = build(make_predictor, {"loss_decoder": weight})
        loss, info = predictor.learn(buffer, **LEARN | {"n_updates": 100})
        parts = info["loss_dynamics"] + 30.0 * info["loss_termination"]
        parts += info["loss_reward"] + info["loss_value"]
        assert loss.item() == pytest.approx(parts + weight * info["loss_decoder"], rel=1e-5)
        found[weight] = info["loss_decoder"]
    assert found[0.5] < 0.5 * found[0.0]


def test_its_parameters_are_saved_copied_and_kept_apart(make_predictor, make_buffer):
    predictor, buffer = build(make_predictor, {"loss_decoder": 1.0}), make_buffer()
    predictor.learn(buffer, **LEARN)
    resumed = build(make_predictor, {"loss_decoder": 1.0})
    resumed.load_state_dict(predictor.state_dict())
    resumed.optim.load_state_dict(copy.deepcopy(predictor.optim.state_dict()))
    found = []
    for one in (predictor, resumed, copy.deepcopy(resumed)):
        torch.manual_seed(1)
        found.append(one.learn(buffer, **LEARN)[1])
    assert found[0] == found[1] == found[2]


def test_a_term_without_a_weight_is_refused(make_predictor, make_buffer, unchanged):
    predictor = build(make_predictor, {"loss_decode": 1.0})
    with unchanged(predictor), pytest.raises(ValueError, match=r"loss_decoder.*no weight"):
        predictor.learn(make_buffer(), **LEARN)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), "1"])
@pytest.mark.parametrize("name", ["consistency", "termination", "rew", "value", "own"])
def test_a_weight_that_is_none_is_refused(make_predictor, name, weight):
    own = {"loss_decoder": weight if name == "own" else 1.0}
    options = {} if name == "own" else {f"{name}_loss_weight": weight}
    with pytest.raises((TypeError, ValueError), match=r"weight|loss"):
        build(make_predictor, own, **options)
