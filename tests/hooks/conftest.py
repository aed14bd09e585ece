"""Imagined environments for TorchRL to run on."""

from __future__ import annotations

import pytest
from helpers import make_buffer, make_predictor
from torch import nn
from torchrl.data import Categorical, OneHot
from torchrl.envs import StepCounter, TransformedEnv

from layeredrl_torchrl import TS1, FixedEncoderNet, FromBuffer, PredictorEnv

SPACES = {"box": 1, "one-hot": OneHot(3), "integer": Categorical(3)}


@pytest.fixture
def predictor():
    """``predictor(space)``: state of two dimensions, context of one, random heads."""

    def build(space="box", **parts):
        encoder = FixedEncoderNet((3,), [0, 1], [2])
        built = make_predictor(
            encoder, context_dim=1, model={"n_models": 3, "action_space": SPACES[space]}, **parts
        )
        for head in (built.rew_func, built.val_func):
            nn.init.normal_(head.net[-1].weight)
        return built

    return build


@pytest.fixture
def imagined(predictor):
    """``imagined(space)``: twelve instances that start in a buffer and end at times."""

    def build(space="box", n=12, **options):
        given = predictor(space)
        env = PredictorEnv(
            given,
            propagation=TS1(),
            sample_termination=True,
            initial_states=FromBuffer(make_buffer(obs_dim=3), given),
            batch_size=[n],
            **options,
        )
        return TransformedEnv(env, StepCounter(4))

    return build
