"""Actors, critics and predictors for value gradients: of closed form, or with random weights."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import nn
from torchrl.data import Bounded, Unbounded
from torchrl.modules import IndependentNormal, ValueOperator

from layeredrl_torchrl import (
    IdentityEncoder,
    Model,
    PredictorFactory,
    StaticPredictor,
    ValueGradientLoss,
)
from layeredrl_torchrl.nets import QValueOperator, TanhActor

ACTION = Bounded(-1.0, 1.0, (2,))


class Line(Model):
    """``s' = a s + u`` in one dimension, exactly; the episode ends with ``term_prob``."""

    def __init__(self, factor=0.9, term_prob=0.0):
        super().__init__(Unbounded((1,)), None, Bounded(-9.0, 9.0, (1,)), n_models=1)
        self.factor, self.term_prob = factor, term_prob

    def predict_members(self, state, context, action):
        mean = (self.factor * state + action).unsqueeze(-2)
        term_prob = torch.full(state.shape[:2], self.term_prob, dtype=state.dtype)
        return (mean, torch.zeros_like(mean)), torch.ones_like(mean[..., 0]), term_prob


class Gain(nn.Module):
    """The linear policy ``u = gain * s``, with a fixed std."""

    def __init__(self, gain, std):
        super().__init__()
        self.gain, self.std = nn.Parameter(torch.tensor(gain)), std

    def forward(self, state):
        return self.gain * state, torch.full_like(state, self.std)


class Square(nn.Module):
    """The value ``-weight * s^2``, whatever the action."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, state, action):
        return -self.weight * state.square() + 0.0 * action


def make_actor(net):
    return ProbabilisticTensorDictSequential(
        TensorDictModule(net, ["state"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"], out_keys=["action"], distribution_class=IndependentNormal
        ),
    )


def make_line(
    *, gain=0.3, std=1e-6, weight=2.0, alpha=1e-12, term_prob=0.0, reward=None, **options
):
    reward = reward or (lambda state, context, action: -(state**2 + 0.5 * action**2)[..., 0])
    predictor = StaticPredictor(Line(term_prob=term_prob), None, reward, IdentityEncoder((1,)), 1)
    critic = ValueOperator(Square(weight), in_keys=["state", "action"])
    options = {"fixed_alpha": True, "alpha_init": alpha} | options
    return ValueGradientLoss(make_actor(Gain(gain, std)), critic, predictor, **options)


def make_learned(dtype=torch.float32, scale=1.0, **options):
    """Actor, critics and predictor with random weights, two states, two actions."""
    predictor = PredictorFactory(hidden_sizes=(8,), n_models=3)(Unbounded((2,)), ACTION)
    actor, critic = TanhActor(2, 0, ACTION, (8,)), QValueOperator(2, 0, 2, (8,))
    for module in (predictor, critic):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
    predictor.rew_func.rescale(0.0, scale)
    loss = ValueGradientLoss(actor, critic, predictor, **options)
    predictor.to(dtype)
    return loss.to(dtype)


def make_steps(*batch, dtype=torch.float32):
    done = torch.rand(*batch, 1) < 0.2
    after = {"state": torch.randn(*batch, 2, dtype=dtype), "done": done}
    after |= {"reward": torch.randn(*batch, 1, dtype=dtype)}
    after["terminated"] = done & (torch.rand(*batch, 1) < 0.5)
    step = {"state": torch.randn(*batch, 2, dtype=dtype), "action": 0.9 * ACTION.rand(batch)}
    return TensorDict({**step, "next": after}, batch)
