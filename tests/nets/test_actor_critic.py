"""Policy and critics in state space, beside TorchRL's own distributions."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import gymnasium as gym
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded, Categorical, Unbounded
from torchrl.envs import ExplorationType, set_exploration_type
from torchrl.modules import TanhNormal

from layeredrl_torchrl.nets import (
    Bounds,
    QValueOperator,
    RewardNet,
    ScalarHead,
    SquashedNormal,
    TanhActor,
    ValueNet,
)

LOW, HIGH = torch.tensor([-1.0, 0.5]), torch.tensor([2.0, 0.75])


def both(loc, scale):
    ours = SquashedNormal(loc, scale, Bounds(LOW.to(loc), HIGH.to(loc)))
    return ours, TanhNormal(loc, scale, low=LOW.to(loc), high=HIGH.to(loc))


@pytest.mark.parametrize("batch", [(), (50,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("drawn", [(), (6,)])
def test_the_distribution_is_torchrl_s(drawn, batch):
    loc, scale = torch.randn(2, *batch, 2, dtype=torch.float64)
    ours, theirs = both(loc, scale.abs() + 0.1)
    assert ours.batch_shape == batch
    assert ours.event_shape == (2,)
    torch.manual_seed(0)
    action, log_prob = ours.rsample_and_log_prob(drawn)
    torch.manual_seed(0)
    expected = theirs.rsample(drawn)
    their_log_prob = theirs.log_prob(expected)
    torch.testing.assert_close(action, expected)
    torch.testing.assert_close(log_prob, their_log_prob)
    torch.testing.assert_close(ours.log_prob(action), log_prob)
    torch.testing.assert_close(ours.deterministic_sample, theirs.deterministic_sample)
    assert torch.equal(ours.mode, ours.deterministic_sample)  # theirs has none
    assert ours.rsample((3,)).shape == (3, *batch, 2)


def test_its_density_integrates_to_one():
    ours, _ = both(torch.zeros(1, 2), torch.ones(1, 2))
    grids = [torch.linspace(*ends, 801)[1:-1] for ends in zip(LOW, HIGH, strict=True)]
    points = torch.cartesian_prod(*grids)
    cell = ((HIGH - LOW) / 800).prod()
    assert (ours.log_prob(points).exp().sum() * cell).item() == pytest.approx(1.0, abs=1e-3)


def test_saturated_actions_keep_density_and_gradient():
    loc = torch.tensor([[40.0, -40.0]], requires_grad=True)
    ours, _ = both(loc, torch.full((1, 2), 0.1))
    action, log_prob = ours.rsample_and_log_prob()
    assert action.isfinite().all()
    assert log_prob.isfinite().all()
    (slope,) = torch.autograd.grad(log_prob.sum(), loc)
    torch.testing.assert_close(slope, torch.tensor([[2.0, -2.0]]))  # of -log(1 - tanh^2)
    assert ours.log_prob(torch.stack((HIGH, LOW))).isfinite().all()


@pytest.mark.parametrize("context_dim", [0, 3])
def test_the_actor_acts_within_its_bounds(context_dim):
    actor = TanhActor(4, context_dim, gym.spaces.Box(LOW.numpy(), HIGH.numpy()), (8,))
    td = TensorDict({"state": 9 * torch.randn(40, 4), "context": torch.randn(40, 3)}, [40])
    assert actor.in_keys == ["state", "context"][: 1 + bool(context_dim)]
    with set_exploration_type(ExplorationType.RANDOM):
        actions = [actor(td.clone())["action"] for _ in range(2)]
    assert not torch.equal(*actions)
    assert ((actions[0] >= LOW) & (actions[0] <= HIGH)).all()
    for twin in (copy.deepcopy(actor), pickle.loads(pickle.dumps(actor))):
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            assert torch.equal(*(x(td.clone())["action"] for x in (actor, twin)))
    assert set(actor(td.clone()).keys()) - {"loc", "scale"} == {"state", "context", "action"}
    double = copy.deepcopy(actor).double()(td.double())
    assert double["action"].dtype == torch.float64


@pytest.mark.parametrize("how", ["autocast", "cast"])
def test_in_low_precision_actions_keep_their_bounds_and_density(how):
    """Of 0.3 the nearest number in bfloat16 is 0.3008."""
    bound = torch.tensor([0.3, 0.7])
    actor = TanhActor(4, 0, Bounded(-bound, bound, (2,)), (8,))
    state = 9 * torch.randn(400, 4)
    if how == "cast":
        actor, state = actor.to(torch.bfloat16), state.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"), torch.no_grad():
        dist = actor.get_dist(TensorDict({"state": state}, [400]))
        torch.manual_seed(0)
        action, log_prob = dist.rsample_and_log_prob()
    assert action.dtype == log_prob.dtype == torch.float32
    assert (action.abs() <= bound).all()
    torch.manual_seed(0)
    before = dist.loc.double() + dist.scale.double() * torch.randn(400, 2).double()
    exact = torch.distributions.Normal(dist.loc.double(), dist.scale.double()).log_prob(before)
    exact = exact - (bound.double() / before.cosh().square()).log()
    torch.testing.assert_close(log_prob.double(), exact.sum(-1), rtol=0, atol=1e-3)


@pytest.mark.parametrize("context_dim", [0, 1])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (1, 2, 3)])
def test_a_value_stands_in_an_axis_of_its_own(batch, context_dim):
    critic = QValueOperator(2, context_dim, 1, (8,))
    torch.nn.init.normal_(critic.module.head.net[-1].weight)
    widths = {"state": 2, "context": context_dim, "action": 1}
    td = TensorDict({name: torch.randn(*batch, n) for name, n in widths.items()}, batch)
    found = critic(td.clone())["state_action_value"]
    torch.testing.assert_close(found, critic.module.head(*td.values()).reshape(*batch, 1))
    renamed = QValueOperator(2, context_dim, 1, (8,), in_keys=["z", "c", ("agent", "u")])
    assert renamed.out_keys == ["state_action_value"]


def test_hidden_layers_are_normalised_unless_it_is_said_otherwise():
    """Two of 128 by default; and heads of one's own are plain networks."""

    class Head(ScalarHead):
        def features(self, state, context, action):
            return state

    action, sizes = Bounded(-1.0, 1.0, (1,)), (8, 8)
    for make, normalised in (
        (partial(TanhActor, 2, 0, action), True),
        (partial(QValueOperator, 2, 0, 1), True),
        (partial(RewardNet, 2, 0, 1), True),
        (partial(ValueNet, 2, 0), True),
        (partial(Head, 2, nonlinearity=nn.SiLU), False),
    ):
        if normalised:
            widths = [part.out_features for part in make().modules() if isinstance(part, nn.Linear)]
            assert widths[:-1] == [128, 128]
        for options, expected in (
            ({}, normalised),
            ({"layer_norm": True}, True),
            ({"layer_norm": False}, False),
        ):
            parts = list(make(hidden_sizes=sizes, **options).modules())
            assert sum(isinstance(part, nn.LayerNorm) for part in parts) == 2 * expected


def test_inputs_are_standardised():
    actor, critic = TanhActor(2, 1, Bounded(-1.0, 1.0, (1,)), (8,)), QValueOperator(2, 1, 1, (8,))
    sample = 3.0 + 2.0 * torch.randn(500, 2), torch.randn(500, 1), torch.rand(500, 1)
    for network, n in ((actor[0].module, 3), (critic.module.head, 4)):
        network.fit_inputs(*sample)
        found = network.inputs(torch.cat(sample, -1)[:, :n])
        torch.testing.assert_close(found.mean(0), torch.zeros(n), atol=1e-5, rtol=0)
        torch.testing.assert_close(found.std(0, correction=0), torch.ones(n), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("space", "error", "message"),
    [
        (Unbounded((1,)), TypeError, "bounds"),
        (Categorical(3), TypeError, "Box of floats"),
        (gym.spaces.Box(-float("inf"), 1.0, (1,)), (TypeError, ValueError), "bounds"),
        (Bounded(-3e38, 3e38, (1,)), ValueError, "does not overflow"),
        (Bounded(0.5, 0.5, (1,)), ValueError, "high above low"),
    ],
    ids=str,
)
def test_actions_without_bounds_are_refused(space, error, message):
    with pytest.raises(error, match=message):
        TanhActor(2, 0, space)


@pytest.mark.parametrize(
    ("build", "in_keys", "error"),
    [
        (partial(TanhActor, 2, 1), "state", TypeError),
        (partial(TanhActor, 2, 1), ["state"], ValueError),
        (partial(TanhActor, 2, 0), ["state", "context", "action"], ValueError),
        (partial(QValueOperator, 2, 0), "abc", TypeError),
        (partial(QValueOperator, 2, 0), ["state", "action"], ValueError),
    ],
)
def test_each_input_has_a_key(build, in_keys, error):
    with pytest.raises(error, match="in_keys must"):
        build(Bounded(-1.0, 1.0, (1,)), in_keys=in_keys)
