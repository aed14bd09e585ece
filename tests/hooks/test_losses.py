"""Each of TorchRL's losses learns from imagined data."""

from __future__ import annotations

import re

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Bounded
from torchrl.modules import (
    MLP,
    ProbabilisticActor,
    QValueActor,
    TanhModule,
    TanhNormal,
    ValueOperator,
)
from torchrl.modules.distributions import OneHotCategorical
from torchrl.objectives import (
    A2CLoss,
    ClipPPOLoss,
    CQLLoss,
    CrossQLoss,
    DDPGLoss,
    DiscreteCQLLoss,
    DiscreteIQLLoss,
    DiscreteSACLoss,
    DQNLoss,
    DreamerActorLoss,
    DreamerValueLoss,
    IQLLoss,
    KLPENPPOLoss,
    PPOLoss,
    REDQLoss,
    ReinforceLoss,
    SACLoss,
    SoftUpdate,
    TD3BCLoss,
    TD3Loss,
    TQCLoss,
)

from layeredrl_torchrl import TS1, PredictorEnv, ValueGradientLoss

STATE = ["state", "context"]
N_STATE, N_CHOICES = 3, 3
BOX = Bounded(-1.0, 1.0, (1,))


def mlp(n_in, n_out, **options):
    return MLP(n_in, n_out, depth=1, num_cells=8, **options)


def gaussian(**options):
    """A policy that reads state and context."""
    net = TensorDictModule(mlp(N_STATE, 2), STATE, ["params"])
    split = TensorDictModule(NormalParamExtractor(), ["params"], ["loc", "scale"])
    return ProbabilisticActor(
        TensorDictSequential(net, split),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        spec=BOX,
        **options,
    )


def choosing(**options):
    return ProbabilisticActor(
        TensorDictModule(mlp(N_STATE, N_CHOICES), STATE, ["logits"]),
        in_keys=["logits"],
        distribution_class=OneHotCategorical,
        **options,
    )


def deterministic():
    net = TensorDictModule(mlp(N_STATE, 1), STATE, ["action"])
    return TensorDictSequential(net, TanhModule(in_keys=["action"], spec=BOX))


def value():
    return ValueOperator(mlp(N_STATE, 1), in_keys=STATE)


def action_value():
    return ValueOperator(mlp(N_STATE + 1, 1), in_keys=[*STATE, "action"])


def choice_values(key):
    return TensorDictModule(mlp(N_STATE, N_CHOICES), STATE, [key])


def quantiles():
    net = mlp(N_STATE + 1, 7)
    return TensorDictModule(net, [*STATE, "action"], ["state_action_value"])


def crossq(env):
    """Without target networks, but with statistics of the batch."""
    net = mlp(N_STATE + 1, 1, norm_class=nn.BatchNorm1d, norm_kwargs={"num_features": 8})
    return CrossQLoss(gaussian(), ValueOperator(net, in_keys=[*STATE, "action"]))


def choosing_best():
    return QValueActor(mlp(N_STATE, N_CHOICES), in_keys=STATE, action_space="one-hot")


def with_advantage(kind, make=gaussian, **options):
    return lambda env: kind(make(return_log_prob=True), value(), **options)


CONTINUOUS = {
    "SAC": lambda env: SACLoss(gaussian(), action_value()),
    "SAC with a value": lambda env: SACLoss(gaussian(), action_value(), value()),
    "TD3": lambda env: TD3Loss(deterministic(), action_value(), action_spec=BOX),
    "TD3+BC": lambda env: TD3BCLoss(deterministic(), action_value(), action_spec=BOX),
    "DDPG": lambda env: DDPGLoss(deterministic(), action_value()),
    "REDQ": lambda env: REDQLoss(gaussian(), action_value(), num_qvalue_nets=3),
    "TQC": lambda env: TQCLoss(gaussian(), quantiles(), num_qvalue_nets=2),
    "CrossQ": crossq,
    "IQL": lambda env: IQLLoss(gaussian(), action_value(), value()),
    "CQL": lambda env: CQLLoss(gaussian(), action_value(), num_random=2),
    "PPO": with_advantage(PPOLoss),
    "PPO, clipped": with_advantage(ClipPPOLoss),
    "PPO, KL": with_advantage(KLPENPPOLoss),
    "A2C": with_advantage(A2CLoss),
    "REINFORCE": with_advantage(ReinforceLoss),
    "value gradients": lambda env: ValueGradientLoss(
        gaussian(), action_value(), env.base_env.predictor, horizon=2
    ),
}
DISCRETE = {
    "DQN": lambda env: DQNLoss(choosing_best(), action_space="one-hot"),
    "discrete SAC": lambda env: DiscreteSACLoss(
        choosing(), choice_values("action_value"), action_space="one-hot", num_actions=N_CHOICES
    ),
    "discrete IQL": lambda env: DiscreteIQLLoss(
        choosing(), choice_values("state_action_value"), value(), action_space="one-hot"
    ),
    "discrete CQL": lambda env: DiscreteCQLLoss(choosing_best(), action_space="one-hot"),
    "PPO of choices": with_advantage(PPOLoss, choosing),
}
ON_POLICY = PPOLoss, A2CLoss, ReinforceLoss
CASES = [(name, "box", make) for name, make in CONTINUOUS.items()]
CASES += [(name, "one-hot", make) for name, make in DISCRETE.items()]


def acting(loss):
    """The policy of a loss, with its current weights; random actions for critics alone."""
    return loss.get_stateful_net("actor_network") if hasattr(loss, "actor_network") else None


def networks(loss):
    """Copies of the trained parameters."""
    return {name: p.detach().clone() for name, p in loss.named_parameters()}


def descend(loss, data, optimizer, read=lambda x: x):
    """One gradient step on all terms of a loss."""
    losses = read(loss(data))
    terms = {key: x for key, x in losses.items() if key.startswith("loss")}
    assert terms
    assert all(x.isfinite() for x in terms.values()), terms
    optimizer.zero_grad()
    sum(terms.values()).backward()
    optimizer.step()


def check_moved(before, after):
    assert before.keys() == after.keys()
    still = [name for name, old in before.items() if torch.equal(old, after[name])]
    assert not still, f"these are as they were: {still}"


@pytest.mark.filterwarnings("ignore:No target network updater")
@pytest.mark.parametrize(("name", "space", "make"), CASES, ids=[case[0] for case in CASES])
def test_three_steps_move_every_network_but_the_model(imagined, unchanged, name, space, make):
    env = imagined(space)
    loss = make(env)
    before = networks(loss)
    optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
    has_target = any(re.match(r"target_\w+_params\.", key) for key, _ in loss.named_buffers())
    target = SoftUpdate(loss, tau=0.1) if has_target else None
    with unchanged(env.base_env.predictor):
        for data in Collector(env, acting(loss), frames_per_batch=60, total_frames=180):
            assert data.batch_size == (12, 5)
            if isinstance(loss, ON_POLICY):
                with torch.no_grad():
                    loss.value_estimator(data)
            descend(loss, data.reshape(-1), optimizer)
            if target is not None:
                target.step()
    check_moved(before, networks(loss))


@pytest.mark.filterwarnings("ignore:No target network updater")
def test_dreamers_actor_and_critic_learn_from_rollouts_of_their_own(predictor, unchanged):
    """The context stands for the belief, and no step ends: TorchRL would cut all rows there.

    Dreamer's third loss trains a model of its own kind.
    """
    never = lambda state, context, action: torch.zeros_like(state[..., 0])  # noqa: E731
    env, critic = PredictorEnv(predictor(term_func=never), propagation=TS1()), value()
    actor_loss = DreamerActorLoss(gaussian(), critic, env, imagination_horizon=4)
    actor_loss.set_keys(belief="context")
    actor_loss.make_value_estimator(gamma=0.9, lmbda=0.9)
    critic_loss = DreamerValueLoss(critic)
    before = networks(actor_loss.actor_model), networks(critic)
    actor_steps = torch.optim.Adam(actor_loss.actor_model.parameters(), 1e-2)
    critic_steps = torch.optim.Adam(critic.parameters(), 1e-2)
    fakes = []

    def kept(results):
        fakes.append(results[1])
        return results[0]

    with unchanged(env.predictor):
        for _ in range(3):
            start = env.predictor.encode(TensorDict({"observation": torch.randn(12, 3)}, [12]))
            descend(actor_loss, start, actor_steps, kept)
            descend(critic_loss, fakes[-1], critic_steps, lambda results: results[0])
    assert fakes[-1].batch_size == (12, 4)
    check_moved(before[0], networks(actor_loss.actor_model))
    check_moved(before[1], networks(critic))
