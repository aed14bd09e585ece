"""Loss terms that a user adds to a predictor's."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import LEARN, learn, make_buffer, make_predictor, unchanged
from torch import nn
from torchrl.objectives import SoftUpdate

from layeredrl_torchrl import (
    EncoderNet,
    ModelTraining,
    PredictorLoss,
    RewardNet,
    TermsLoss,
    ValueNet,
)


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


class Fading(TermsLoss):
    """Counts in a less and less; its only state is a buffer."""

    fails_at = -1

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.register_buffer("n", torch.zeros(()))

    def terms(self, prepared):
        state, _ = self.encoder(prepared["observation"])
        return {"loss_fading": state.square().mean() * 0.9**self.n, "nll": self.n + 0.0}

    def after_update(self):
        self.n += 1
        if self.n == self.fails_at:
            raise RuntimeError("stop")


def faded(n=1):
    predictor = make_predictor(EncoderNet((2,), 2, 0))
    losses = [Fading(predictor.encoder) for _ in range(n)]
    for i, loss in enumerate(losses):
        predictor.add_loss(loss, {"loss_fading": 1.0 + i})
    return predictor, losses


def test_buffers_of_a_loss_are_saved_and_put_back_after_an_error():
    predictor, (loss,) = faded()
    learn(predictor, make_buffer())
    resumed, (other,) = faded()
    resumed.load_state_dict(predictor.state_dict())
    assert other.n == loss.n == predictor.n_learn_updates > 0
    n, loss.fails_at = loss.n.clone(), int(loss.n) + 2
    with unchanged(predictor), pytest.raises(RuntimeError, match="stop"):
        learn(predictor, make_buffer())
    assert loss.n == n


def test_a_loss_without_anything_of_its_own_adds_nothing_to_the_state():
    class Small(TermsLoss):
        def __init__(self, whole):
            super().__init__()
            self.whole = whole

        def terms(self, prepared):
            return {"loss_small": self.whole.encoder(prepared["observation"])[0].square().mean()}

    predictor = make_predictor(EncoderNet((2,), 2, 0))
    before = set(predictor.state_dict())
    predictor.add_loss(Small(predictor), {"loss_small": 1.0})
    learn(predictor, make_buffer())
    assert set(predictor.state_dict()) == before


def test_terms_of_equal_names_are_all_reported():
    """Also one that has the name of a term of the predictor's."""
    predictor, _ = faded(2)
    torch.manual_seed(0)
    loss, info = predictor.learn(make_buffer(), **LEARN | {"n_updates": 3})
    assert info["Fading_2.nll"] == info["Fading_3.nll"] == 1.0  # of 0, 1, 2
    assert info["nll"] != 1.0
    assert info["model_updates"] == 3.0
    parts = info["loss_dynamics"] + 30.0 * info["loss_termination"]
    parts += info["loss_reward"] + info["loss_value"]
    parts += info["loss_fading"] + 2.0 * info["Fading_3.loss_fading"]
    assert loss.item() == pytest.approx(parts, rel=1e-5)


def auxiliary(predictor, **options):
    parts = RewardNet(2, 0, 1), ValueNet(2, 0, (4,))
    return PredictorLoss(
        predictor.encoder, *parts, gamma=0.9, action_spec=predictor.model.action_form, **options
    )


def test_a_second_predictor_loss_hides_nothing_and_its_target_follows():
    predictor = make_predictor(EncoderNet((2,), 2, 0), tau=0.25)
    loss = auxiliary(predictor)
    predictor.add_loss(loss, {"loss_reward": 2.0, "loss_value": 3.0})
    before = [p.clone() for p in loss.target_val_func.parameters()]
    total, info = predictor.learn(make_buffer(), **LEARN | {"n_updates": 1})
    for old, now, online in zip(
        before, loss.target_val_func.parameters(), loss.val_func.parameters(), strict=True
    ):
        torch.testing.assert_close(now, old + 0.25 * (online - old))
    parts = info["loss_dynamics"] + 30.0 * info["loss_termination"]
    parts += info["loss_reward"] + info["loss_value"]
    parts += 2.0 * info["PredictorLoss_2.loss_reward"] + 3.0 * info["PredictorLoss_2.loss_value"]
    assert total.item() == pytest.approx(parts, rel=1e-5)


class Still(PredictorLoss):
    def after_update(self):
        """Somebody else moves the target."""


def test_a_target_that_something_else_moves_is_left_to_it():
    predictor = make_predictor(EncoderNet((2,), 2, 0))
    associated = auxiliary(predictor)
    SoftUpdate(associated, tau=0.5)
    own = Still(predictor.encoder, None, ValueNet(2, 0, (4,)))
    for loss in (associated, own):
        predictor.add_loss(loss, {"loss_reward": 1.0, "loss_value": 1.0})
        with unchanged(loss.target_val_func):
            learn(predictor, make_buffer())
    shared = auxiliary(predictor, target_val_func=predictor.target_val_func)
    predictor.add_loss(shared, {"loss_reward": 1.0, "loss_value": 1.0})
    assert shared.tau is None  # the predictor moves it
