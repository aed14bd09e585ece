"""What all levels share."""

from __future__ import annotations

import gymnasium as gym
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, OneHot, Unbounded

from layeredrl_torchrl import Level


class Constant(Level):
    """The smallest level: always the same action, and nothing to learn."""

    def __init__(self, action_space, **options):
        super().__init__(**options)
        self.setup(Unbounded((2,)), action_space)

    def forward(self, tensordict):
        action = self.action_spec.zero(tensordict.batch_size)
        return tensordict.set("action", action)

    def learn(self, data):
        return {}


def test_a_level_without_predictor():
    level = Constant(gym.spaces.Discrete(3), input_spec=OneHot(4))
    assert level.predictor is level.optim is level.parent_predictor is None
    assert level.action_spec.n == 3
    assert level.input_spec == OneHot(4)
    assert level.name == "Constant"
    assert level(TensorDict(batch_size=[5]))["action"].shape == (5,)


def test_the_parent_predictor_stays_its_owners(make_predictor):
    level, predictor = Constant(Bounded(-1.0, 1.0, (2,))), make_predictor()
    level.attach(predictor)
    assert level.parent_predictor is predictor
    assert not level.state_dict()
    assert not list(level.parameters())
    level.double()
    assert next(predictor.parameters()).dtype == torch.float32
    level.attach(None)
    assert level.parent_predictor is None


def test_bad_input():
    with pytest.raises(TypeError, match=r"action_spec is 3 .*expected a gymnasium Box"):
        Constant(3)
    with pytest.raises(ValueError, match=r"input_spec has shape \(2, 2\)"):
        Constant(OneHot(3), input_spec=Bounded(0.0, 1.0, (2, 2)))
    with pytest.raises(TypeError, match=r"got Constant; pass the upper level's \.predictor"):
        Constant(OneHot(3)).attach(Constant(OneHot(3)))
