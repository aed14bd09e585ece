"""Predictors on hand-written models."""

from __future__ import annotations

import pytest
from shifts import Shifts

from layeredrl_torchrl import TS1, Expectation, FixedEncoderNet, StaticPredictor, TSInfinity


@pytest.fixture(params=[Expectation(), TS1(), TSInfinity()], ids=lambda x: type(x).__name__)
def propagation(request):
    """Each way of propagating particles in turn."""
    return request.param


@pytest.fixture
def wrap():
    """Put a model of one state and one context dimension into a predictor."""

    def build(model, rew_func=None):
        encoder = FixedEncoderNet((2,), latent_state_dims=[0], context_dims=[1])
        rew_func = rew_func or (lambda state, context, action: -((state - context)[..., 0] ** 2))
        return StaticPredictor(model, None, rew_func, encoder, 1, 1)

    return build


@pytest.fixture
def make_shifts(wrap):
    """Build a predictor on the model whose states tell which member moved them."""

    def build(n_models=3, term_prob=None):
        return wrap(Shifts(n_models, term_prob))

    return build
