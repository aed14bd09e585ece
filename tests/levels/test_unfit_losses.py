"""Losses and networks that do not fit a level, and what being asked leaves as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import SPACES, make_transitions, model_free_level
from loss_parts import (
    LOSSES,
    SIDES,
    critic,
    critic_of_states,
    deterministic,
    dqn,
    gaussian,
    learner_of,
    mlp,
    normed,
)
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, Categorical, OneHot
from torchrl.modules import OneHotCategorical, ProbabilisticActor, QValueActor, ValueOperator
from torchrl.objectives import (
    A2CLoss,
    BCLoss,
    ClipPPOLoss,
    CQLLoss,
    DiscreteIQLLoss,
    DiscreteSACLoss,
    DQNLoss,
    IQLLoss,
    PPOLoss,
    ReinforceLoss,
    SACLoss,
    TD3Loss,
)

from layeredrl_torchrl import ModelFreeLevel
from layeredrl_torchrl.levels import LossLearner

WIDE = Bounded(-1.0, 1.0, (3,))


def sized(n_actor, n_written, n_critic, n_choices=None):
    """TD3 with networks of these widths, or DQN."""

    def make(*_):
        if n_choices is not None:
            net = QValueActor(mlp(n_actor, n_choices), in_keys=["features"], spec=OneHot(n_choices))
            return DQNLoss(net, action_space=OneHot(n_choices))
        actor = TensorDictModule(mlp(n_actor, n_written), ["features"], ["action"])
        return TD3Loss(actor, ValueOperator(mlp(n_critic, 1), **SIDES), bounds=(-1.0, 1.0))

    return make


def says_nothing(*spaces):
    class Silent(TD3Loss):
        def forward(self, tensordict):
            return super().forward(tensordict).select("pred_value")

    return Silent(deterministic(*spaces), critic(*spaces), bounds=(-1.0, 1.0))


@pytest.mark.parametrize(
    ("make", "spec", "message"),
    [
        (sized(5, 3, 5), WIDE, r"policy of TD3Loss .*\[N, 2\], .* Bounded\w+ \(3,\).*4x2 and 5x32"),
        (sized(2, 1, 5), WIDE, r"policy .*shape \(4, 1\), expected \(4, 3\)"),
        (sized(2, 4, 5), WIDE, r"policy .*shape \(4, 4\), expected \(4, 3\)"),
        (sized(2, 3, 6), WIDE, r"loss of TD3Loss .*\[N, 2\] and 'action' \[N, 3\] in \[-1, 1\]"),
        (sized(2, 3, 5), OneHot(3), r"policy .*OneHot \(3,\).*which is none of the choices"),
        (sized(2, 0, 0, n_choices=5), OneHot(3), "policy of DQNLoss"),
        (sized(2, 0, 0, n_choices=5), Categorical(3), "policy of DQNLoss"),
        (says_nothing, WIDE, r"\['pred_value'\], none of which begins with 'loss'"),
    ],
)
def test_networks_that_do_not_fit_are_refused_when_the_level_is_built(make, spec, message):
    with pytest.raises(ValueError, match=rf"(?s){message}.*arguments of learner_factory"):
        model_free_level(SPACES[0], spec, learner_factory=learner_of(make))


def discrete(kind):
    def make(n_in, spec):
        values = "state_action_value" if kind is DiscreteIQLLoss else "action_value"
        actor = ProbabilisticActor(
            TensorDictModule(mlp(n_in, 3), ["features"], ["logits"]),
            in_keys=["logits"],
            distribution_class=OneHotCategorical,
            return_log_prob=True,
        )
        qvalue = TensorDictModule(mlp(n_in, 3), ["features"], [values])
        if kind is DiscreteIQLLoss:
            value = ValueOperator(mlp(n_in, 1), in_keys=["features"])
            return kind(actor, qvalue, value, action_space="one-hot")
        return kind(actor, qvalue, action_space="one-hot", num_actions=3)

    return make


def in_doubles(*spaces):
    return TD3Loss(deterministic(*spaces).double(), critic(*spaces).double(), bounds=(-1.0, 1.0))


def several_critics(*spaces):
    critics = [critic(*spaces) for _ in range(3)]
    return SACLoss(gaussian(*spaces), critics, num_qvalue_nets=3, target_entropy=-1.0)


def with_dropout(n_in, spec):
    net = nn.Sequential(nn.BatchNorm1d(n_in), mlp(n_in, 1), nn.Dropout(0.5), nn.Tanh())
    actor = TensorDictModule(net, ["features"], ["action"])
    return TD3Loss(actor, normed(n_in, spec), bounds=(-1.0, 1.0))


def modes_of(loss):
    """Also of the networks that are evaluated, which are no children of the loss."""
    parts = [part for part in vars(loss).values() if isinstance(part, nn.Module)]
    return [m.training for part in (loss, *parts) for m in part.modules()]


def counting(*spaces):
    class Counting(TD3Loss):
        def forward(self, tensordict):
            self.n_calls += 1
            return super().forward(tensordict)

    loss = Counting(deterministic(*spaces), critic(*spaces), bounds=(-1.0, 1.0))
    loss.register_buffer("n_calls", torch.zeros(()))
    return loss


@pytest.mark.parametrize(
    ("make", "spec"),
    [
        (counting, SPACES[1]),
        *((make, SPACES[1]) for make, _ in LOSSES.values()),
        (lambda *a: CQLLoss(gaussian(*a), critic(*a), target_entropy=-1.0), SPACES[1]),
        (lambda *a: IQLLoss(gaussian(*a), critic(*a), critic_of_states(*a)), SPACES[1]),
        (several_critics, SPACES[1]),
        (in_doubles, SPACES[1]),
        (with_dropout, SPACES[1]),
        (dqn, OneHot(3)),
        (dqn, OneHot(3, dtype=torch.float32)),
        (discrete(DiscreteSACLoss), OneHot(3)),
        (discrete(DiscreteIQLLoss), OneHot(3)),
    ],
)
def test_being_asked_when_it_is_built_changes_nothing(make, spec):
    """Also not what is random; batch norm learns only from data."""
    made = {}

    def factory(n_in, given):
        torch.manual_seed(3)
        made["learner"] = learner_of(make)(n_in, given)
        made["state"] = copy.deepcopy(made["learner"].state_dict())
        made["random"] = torch.get_rng_state()
        made["modes"] = modes_of(made["learner"].loss)
        return made["learner"]

    kept = {}

    class Level(ModelFreeLevel):
        def _build(self, *spaces):
            super()._build(*spaces)
            kept["random"] = torch.get_rng_state()

    level = Level(SPACES[0], spec, learner_factory=factory, batch_size=8, n_initial_random_steps=0)
    torch.testing.assert_close(level.learner.state_dict(), made["state"], rtol=0, atol=0)
    assert torch.equal(kept["random"], made["random"])
    assert modes_of(level.learner.loss) == made["modes"]
    if make is in_doubles:
        level = level.double()
    data = make_transitions(20)
    if not isinstance(spec, Bounded):
        data["action"] = spec.rand((20,))
    assert level.learn(data)["n_updates"] == 20


@pytest.mark.parametrize("kind", [PPOLoss, ClipPPOLoss, A2CLoss, ReinforceLoss])
def test_losses_of_trajectories_are_refused(kind):
    def make(n_in, spec):
        return LossLearner(kind(gaussian(n_in, spec), critic_of_states(n_in, spec)), spec)

    with pytest.raises(ValueError, match=rf"{kind.__name__} is an on-policy loss.*SACLoss"):
        model_free_level(*SPACES, learner_factory=make)


def test_a_loss_without_rewards_is_refused():
    with pytest.raises(ValueError, match="BCLoss has no one-step returns"):
        learner_of(lambda *a: BCLoss(gaussian(*a)))(2, SPACES[1])
