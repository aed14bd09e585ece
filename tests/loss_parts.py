"""TorchRL losses for levels, and their networks."""

from __future__ import annotations

from functools import partial

import torch
from helpers import learned_from_inputs
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.data import OneHot
from torchrl.modules import MLP, ProbabilisticActor, QValueActor, TanhNormal, ValueOperator
from torchrl.objectives import CrossQLoss, DDPGLoss, DQNLoss, REDQLoss, TD3Loss, TQCLoss

from layeredrl_torchrl.levels import LossLearner

mlp = partial(MLP, num_cells=[32, 32], activation_class=nn.ReLU)
SIDES = {"in_keys": ["features", "action"]}


def gaussian(n_in, spec):
    net = nn.Sequential(mlp(n_in, 2 * spec.shape[-1]), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(net, ["features"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )


def critic_of_states(n_in, spec):
    return ValueOperator(mlp(n_in, 1), in_keys=["features"])


def deterministic(n_in, spec):
    net = nn.Sequential(mlp(n_in, spec.shape[-1]), nn.Tanh())
    return TensorDictModule(net, ["features"], ["action"])


def critic(n_in, spec, n_out=1, **options):
    return ValueOperator(mlp(n_in + spec.shape[-1], n_out, **options), **SIDES)


def normed(n_in, spec):
    return critic(n_in, spec, norm_class=nn.BatchNorm1d, norm_kwargs=[{"num_features": 32}] * 2)


def soft(kind, make_critic=critic, n=2, **options):
    """A loss with an entropy; few are as certain as a known optimum allows."""
    known = {"num_qvalue_nets": n, "target_entropy": -3.0, "alpha_init": 0.01}
    return lambda n_in, spec: kind(gaussian(n_in, spec), make_critic(n_in, spec), **known | options)


def td3(n_in, spec):
    return TD3Loss(deterministic(n_in, spec), critic(n_in, spec), bounds=(-1.0, 1.0))


def dqn(n_in, spec):
    net = QValueActor(mlp(n_in, 3), in_keys=["features"], spec=OneHot(3))
    return DQNLoss(net, action_space=OneHot(3))


LOSSES = {
    "TD3": (td3, {"actor_every": 2, "targets_every": 2}),
    "DDPG": (lambda *a: DDPGLoss(deterministic(*a), critic(*a)), {}),
    "REDQ": (soft(REDQLoss, n=4, sub_sample_len=2), {}),
    "CrossQ": (soft(CrossQLoss, normed), {"actor_every": 3}),
    "TQC": (soft(TQCLoss, partial(critic, n_out=5), top_quantiles_to_drop_per_net=1), {}),
}


def learner_of(make, lr=1e-2, **options):
    return lambda n_in, spec: LossLearner(make(n_in, spec), spec, lr=lr, **options)


# -- known optima ---------------------------------------------------------------------------


def learned(factory, spec, reward):
    """What a level does that learned from 1500 skills of one step, paid by input and action."""
    options = {"n": 1500, "reach": 0.9, "batch_size": 128, "updates_per_step": 0.2}
    return learned_from_inputs(factory, spec, reward, lambda n: torch.zeros(n, 1), **options)
