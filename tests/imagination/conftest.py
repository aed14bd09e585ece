"""Hand-written ensembles whose states tell which member moved them."""

from __future__ import annotations

import pytest
import torch
from torchrl.data import Bounded, Unbounded

from layeredrl_torchrl import FixedEncoderNet, Model, StaticPredictor


class Shifts(Model):
    """Member m adds 10 ** m, so that a state's digits count which members moved it.

    The probability of termination is m / 10, unless another number is given for all.
    """

    def __init__(self, n_models, term_prob=None):
        spaces = Unbounded((1,)), Unbounded((1,)), Bounded(-1.0, 1.0, (1,))
        super().__init__(*spaces, n_models=n_models)
        self.term_prob = term_prob
        self.rows = []  # how many rows each member was evaluated on, at every step

    def predict_members(self, state, context, action):
        assert state.shape[:2] == context.shape[:2] == action.shape[:2]
        self.rows.append(state.shape[1])
        member = torch.arange(self.n_models, dtype=state.dtype)
        mean = (state + (10.0**member).view(-1, 1, 1)).unsqueeze(-2)
        term_prob = (member / 10.0).unsqueeze(-1).expand(state.shape[:2])
        if self.term_prob is not None:
            term_prob = torch.full_like(term_prob, self.term_prob)
        return (mean, torch.zeros_like(mean)), torch.ones_like(mean[..., 0]), term_prob


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
    """Build a predictor on the model above."""

    def build(n_models=3, term_prob=None):
        return wrap(Shifts(n_models, term_prob))

    return build
