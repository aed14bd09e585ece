"""SAC and DQN: the losses by hand, the policies, and that they find known optima."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from helpers import learned_from_inputs, unchanged
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, Categorical, OneHot, Unbounded
from torchrl.modules import MLP, NormalParamExtractor, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss, ValueEstimators

from layeredrl_torchrl import DQNLearner, SACLearner

BOX = Bounded(torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 10.0]), (2,))
F = 3


def batch_of(n, action):
    """``[n]`` transitions, some of which end."""
    terminated = torch.rand(n, 1) < 0.4
    after = {
        "features": torch.randn(n, F),
        "reward": torch.randn(n, 1),
        "terminated": terminated,
        # A time limit: the value goes on beyond it.
        "done": terminated | (torch.rand(n, 1) < 0.4),
    }
    return TensorDict({"features": torch.randn(n, F), "action": action, "next": after}, [n])


def run(layers, x):
    for weight, bias in layers[:-1]:
        x = (x @ weight.T + bias).clamp_min(0)
    return x @ layers[-1][0].T + layers[-1][1]


def layers_of(params, member=None):
    pick = (lambda x: x) if member is None else (lambda x: x[member])
    return [(pick(params[f"weight_{i}"]), pick(params[f"bias_{i}"])) for i in range(3)]


# -- the losses -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:No target network updater")
@pytest.mark.parametrize("n_critics", [1, 3])
def test_the_loss_and_gradients_of_sac_are_torchrls(n_critics):
    """Beside TorchRL's own networks and vmap, terms and gradients are the same."""
    ours = SACLearner(F, BOX, hidden_sizes=(8, 6), gamma=0.9, n_critics=n_critics).loss
    size = {"num_cells": [8, 6], "activation_class": nn.ReLU}
    mean = nn.Sequential(
        MLP(in_features=F, out_features=4, **size),
        NormalParamExtractor(scale_mapping="exp", scale_lb=0.0),
    )
    actor = ProbabilisticActor(
        TensorDictModule(mean, ["features"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        return_log_prob=True,
    )
    critic = ValueOperator(
        MLP(in_features=F + 2, out_features=1, **size), in_keys=["features", "action"]
    )
    options = {"num_qvalue_nets": n_critics, "action_spec": BOX, "loss_function": "l2"}
    stock = SACLoss(actor, critic, **options)
    stock.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
    pairs = {}
    for name in ("actor_network", "qvalue_network", "target_qvalue_network"):
        their, own = getattr(stock, f"{name}_params"), getattr(ours, f"{name}_params")
        theirs = their["module", "0", "module", "0"] if "actor" in name else their["module"]
        own = own["module", "0"] if "actor" in name else own
        for value in theirs.values(True, True):
            value.data.add_(0.1 * torch.randn_like(value))  # targets differ from what they follow
        for i in range(3):
            for kind in ("weight", "bias"):
                pair = own.get(f"{kind}_{i}"), theirs[str(2 * i), kind]
                pair[0].data.copy_(pair[1].data)
                if not name.startswith("target"):
                    pairs[name, kind, i] = pair
    batch = batch_of(40, 2 * torch.rand(40, 2) - 1)
    results = []
    for loss in (ours, stock):
        torch.manual_seed(3)
        terms = loss(batch.clone())
        sum(terms[f"loss_{x}"] for x in ("actor", "qvalue", "alpha")).backward()
        results.append(terms)
    for name in ("loss_actor", "loss_qvalue", "loss_alpha", "alpha", "entropy"):
        torch.testing.assert_close(results[0][name], results[1][name])
    torch.testing.assert_close(ours.log_alpha.grad, stock.log_alpha.grad)
    assert len(pairs) == 12
    for place, (own, their) in pairs.items():
        assert their.grad.any(), place
        torch.testing.assert_close(own.grad, their.grad)


@pytest.mark.parametrize("spec", [OneHot(4), Categorical(4), Categorical(4, (1,))])
@pytest.mark.parametrize("double", [True, False])
def test_the_loss_of_dqn_is_the_huber_loss_by_hand(spec, double):
    learner = DQNLearner(F, spec, hidden_sizes=(8, 6), gamma=0.8, double=double, tau=0.3, lr=0.1)
    batch = batch_of(40, spec.rand((40,)))
    learner.update(batch.clone())
    loss = learner.loss
    with torch.no_grad():
        own = layers_of(loss.value_network_params["module", "0"])
        target = layers_of(loss.target_value_network_params["module", "0"])
        after = run(target, batch["next", "features"])
        choose = run(own, batch["next", "features"]) if double else after
        value = after.gather(-1, choose.argmax(-1, keepdim=True))
        goal = batch["next", "reward"] + 0.8 * (~batch["next", "terminated"]) * value
        index = batch["action"].long().argmax(-1) if isinstance(spec, OneHot) else batch["action"]
        error = (run(own, batch["features"]).gather(-1, index.reshape(-1, 1)) - goal).abs()
        expected = torch.where(error < 1, error.square() / 2, error - 0.5).mean()
    torch.testing.assert_close(loss(batch)["loss"], expected)


def test_networks_are_as_wide_as_documented_by_default():
    sac, dqn = SACLearner(F, BOX).loss, DQNLearner(F, OneHot(2)).loss
    for network, reads in (
        (sac.actor_network_params, F),
        (sac.qvalue_network_params, F + 2),
        (dqn.value_network_params, F),
    ):
        weights = [w for name, w in network.flatten_keys(".").items() if "weight" in name]
        assert [tuple(w.shape[-2:]) for w in weights[:2]] == [(128, reads), (128, 128)]


@pytest.mark.parametrize(
    "make", [lambda **o: SACLearner(F, BOX, **o), lambda **o: DQNLearner(F, OneHot(2), **o)]
)
def test_targets_follow_and_nothing_changes_at_a_bad_loss(make):
    learner = make(hidden_sizes=(8,), tau=0.25, lr=0.01)
    state = {k: v.clone() for k, v in learner.state_dict().items()}
    action = OneHot(2).rand((10,)) if isinstance(learner, DQNLearner) else torch.zeros(10, 2)
    batch = batch_of(10, action)
    learner.update(batch.clone())
    followed = 0
    for name, value in learner.state_dict().items():
        if "target_" in name and "_params" in name:
            source = learner.state_dict()[name.replace("target_", "")]
            torch.testing.assert_close(value, 0.75 * state[name] + 0.25 * source)
            followed += 1
    assert followed == 4
    batch["next", "reward"][3] = torch.inf
    with unchanged(learner, learner.optim), pytest.raises(ValueError, match="the loss is"):
        learner.update(batch)


# -- the policies ---------------------------------------------------------------------------


def test_actions_are_those_of_the_squashed_gaussian():
    learner = SACLearner(F, BOX, hidden_sizes=(8, 6))
    features = torch.randn(2, 4, F)
    loc, log_std = run(layers_of(learner.loss.actor_network_params["module", "0"]), features).chunk(
        2, -1
    )
    low, high = BOX.space.low, BOX.space.high
    middle = low + (high - low) * 0.5 * (1 + loc.tanh())
    torch.testing.assert_close(learner.act(features, explore=False), middle)
    many = learner.act(features[0, 0].expand(4000, F), explore=True)
    assert BOX.is_in(many)
    back = torch.atanh(learner.prepare(many).double())
    assert (back.mean(0) - loc[0, 0]).abs().max() < 4 * log_std.exp().max() / 4000**0.5
    assert (back.std(0) / log_std[0, 0].exp() - 1).abs().max() < 4 / 8000**0.5


def test_standard_deviations_have_the_limits_of_the_reference():
    learner = SACLearner(F, BOX, hidden_sizes=(8,))
    params = learner.loss.actor_network_params["module", "0"]
    params["bias_1"].data.copy_(torch.tensor([0.0, 0.0, 99.0, -99.0]))
    features = TensorDict({"features": torch.randn(5, F)}, [5])
    with learner.loss.actor_network_params.to_module(learner.loss.actor_network):
        scale = learner.loss.actor_network.get_dist(features).scale
    expected = torch.tensor([2.0, -20.0]).exp().expand(5, 2)
    torch.testing.assert_close(scale, expected, rtol=1e-5, atol=0.0)
    # And at the lower one exploring changes nothing.
    tried, best = (learner.act(features["features"], explore=x)[:, 1] for x in (True, False))
    torch.testing.assert_close(tried, best)


@pytest.mark.parametrize("spec", [OneHot(4), Categorical(4)])
def test_a_share_epsilon_of_the_choices_is_random(spec):
    learner = DQNLearner(F, spec, hidden_sizes=(8,), epsilon=0.4)
    features = torch.randn(1, F).expand(4000, F)
    best = learner.act(features, explore=False)
    assert (best == best[0]).all()
    assert spec.is_in(best)
    tried = learner.act(features, explore=True)
    same = (tried == best).reshape(4000, -1).all(-1).float().mean()
    # A random choice is the best one in a quarter of the cases.
    assert abs(same - 0.7) < 4 * (0.7 * 0.3 / 4000) ** 0.5
    never = DQNLearner(F, spec, hidden_sizes=(8,), epsilon=0.0)
    assert len(never.act(features, explore=True).unique(dim=0)) == 1


def test_a_copy_shares_nothing_and_does_not_learn():
    learner = SACLearner(F, BOX, hidden_sizes=(8,), lr=0.1)
    batch = batch_of(10, torch.zeros(10, 2))
    learner.update(batch.clone())
    other = copy.deepcopy(learner)
    torch.testing.assert_close(other.state_dict(), learner.state_dict(), rtol=0, atol=0)
    with unchanged(other):
        learner.update(batch.clone())
    with pytest.raises(RuntimeError, match="is a copy for acting"):
        other.update(batch)
    # The loss of the copy goes by the copy's own critics.
    losses = []
    for _ in range(2):
        torch.manual_seed(1)
        losses.append(other.loss(batch.clone())["loss_actor"])
        for value in other.loss.qvalue_network_params.values():
            value.data.mul_(2.0)
    assert losses[0] != losses[1]


def test_the_optimizer_of_other_networks_is_refused():
    """A learner takes it as it was, and can go on."""
    learner, batch = SACLearner(F, BOX, hidden_sizes=(8,)), batch_of(20, BOX.rand((20,)))
    learner.update(batch)
    other = SACLearner(F, BOX, hidden_sizes=(9,))
    other.update(batch)
    with (
        unchanged(learner, learner.optim),
        pytest.raises(ValueError, match=r"has \(9, 3\), this one \(8, 3\)"),
    ):
        learner.optim.load_state_dict(other.optim.state_dict())
    learner.update(batch)


# -- known optima ---------------------------------------------------------------------------


def learned(kind, spec, reward, **options):
    """What a level does that learned from 2500 skills of one step, paid by input and action."""
    factory = partial(kind, hidden_sizes=(32, 32), lr=1e-2, tau=0.1, **options)
    size = {"n": 2500, "reach": 0.95, "batch_size": 128}
    return learned_from_inputs(factory, spec, reward, lambda n: torch.randn(n, 2), **size)


def test_sac_finds_the_action_that_the_input_asks_for():
    """The units are those of the action spec: the optimum lies at 5 + 4 z within [0, 10]."""
    spec = Bounded(0.0, 10.0, (1,))
    given, action = learned(
        SACLearner, spec, lambda a, z: -((a - 5 - 4 * z) / 4).square(), alpha_init=0.01
    )
    assert (action - 5 - 4 * given).abs().max() < 1.0
    assert (action - 5 - 4 * given).abs().mean() < 0.25


@pytest.mark.parametrize("spec", [OneHot(3), Categorical(3), Categorical(3, (1,))])
def test_dqn_finds_the_choice_that_the_input_asks_for(spec):
    """Choices stand for -1, 0 and 1; the nearest one to the input is the best."""

    def place(action):
        index = action.long().argmax(-1) if isinstance(spec, OneHot) else action
        return index.reshape(-1, 1) - 1.0

    given, action = learned(DQNLearner, spec, lambda a, z: -(place(a) - z).square())
    clear = (given.abs() - 0.5).abs() > 0.08
    assert torch.equal(place(action)[clear], given.round()[clear])


# -- bad input ------------------------------------------------------------------------------

FAR = torch.finfo(torch.float32).max
DOUBLE_BOX = Bounded(
    torch.tensor([-1.0, -1e300], dtype=torch.float64),
    torch.tensor([1.0, 1e300], dtype=torch.float64),
    dtype=torch.float64,
)


def test_wide_bounds_that_can_be_scaled_to_are_kept():
    learner = SACLearner(F, Bounded(-1e37, 1e37, (2,)), hidden_sizes=(8,))
    ends = torch.tensor([[-1e37, 1e37]])
    torch.testing.assert_close(learner.prepare(ends), torch.tensor([[-1.0, 1.0]]))
    assert learner.act(torch.randn(50, F), explore=True).abs().max() <= 1e37


@pytest.mark.parametrize(
    ("kind", "spec", "error", "message"),
    [
        (SACLearner, OneHot(3), TypeError, "(?s)Bounded spec.*pass DQNLearner"),
        (SACLearner, Unbounded((2,)), TypeError, "Bounded spec"),
        (SACLearner, Bounded(0.0, torch.inf, (2,)), ValueError, "finite bounds"),
        (SACLearner, Bounded(-FAR, FAR, (2,)), ValueError, r"too far apart .*\[0, 1\]"),
        (SACLearner, Bounded(-FAR, 0.0, (2,)), ValueError, r"too far apart .*\[0, 1\]"),
        (SACLearner, DOUBLE_BOX, ValueError, r"too far apart .*\[1\]"),
        (DQNLearner, BOX, TypeError, "(?s)OneHot or Categorical.*pass SACLearner"),
    ],
)
def test_actions_that_it_cannot_take_are_refused(kind, spec, error, message):
    with pytest.raises(error, match=message):
        kind(F, spec)


def test_options_of_sac_have_their_effect():
    assert SACLearner(F, BOX).loss.target_entropy == -2
    assert SACLearner(F, BOX, target_entropy=-0.5).loss.target_entropy == -0.5
    assert float(SACLearner(F, BOX, alpha_init=0.25).loss.alpha_init) == pytest.approx(0.25)
    assert SACLearner(F, BOX, lr=0.125).optim.param_groups[0]["lr"] == 0.125
    # All that is trained is in the optimizer, and the targets are not.
    learner = SACLearner(F, BOX, hidden_sizes=(8,))
    n_trained = sum(p.numel() for group in learner.optim.param_groups for p in group["params"])
    actor, critic = 8 * (F + 1) + 4 * 9, 8 * (F + 3) + 9
    assert n_trained == actor + 2 * critic + 1
