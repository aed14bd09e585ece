"""Any off-policy loss of TorchRL in a ModelFreeLevel: known optima, and a twin by hand."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from helpers import SPACES, make_transitions, model_free_level, unchanged
from loss_parts import (
    LOSSES,
    critic,
    deterministic,
    dqn,
    gaussian,
    learned,
    learner_of,
    mlp,
    normed,
    soft,
    td3,
)
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.data import Bounded, Categorical, OneHot, Unbounded
from torchrl.modules import ProbabilisticActor, QValueActor, TanhNormal, ValueOperator
from torchrl.objectives import (
    CrossQLoss,
    DQNLoss,
    REDQLoss,
    SACLoss,
    SoftUpdate,
    TD3Loss,
    TQCLoss,
    ValueEstimators,
)

from layeredrl_torchrl import DQNLearner, SACLearner
from layeredrl_torchrl.levels import LossLearner


@pytest.mark.parametrize("name", ["TD3", "CrossQ"])
def test_it_finds_the_action_that_the_input_asks_for(name):
    """In the units of the spec: the optimum lies at 5 + 4 z within [0, 10]."""
    make, options = LOSSES[name]
    spec = Bounded(0.0, 10.0, (1,))
    factory = learner_of(make, **options)
    given, action = learned(factory, spec, lambda a, z: -((a - 5 - 4 * z) / 4).square())
    assert (action - 5 - 4 * given).abs().mean() < 0.6


def test_it_finds_the_choice_that_the_input_asks_for():
    def pay(action, z):
        return -(action.long().argmax(-1, keepdim=True) - 1.0 - z).square()

    given, action = learned(learner_of(dqn), OneHot(3), pay)
    clear = ((given.abs() - 0.5).abs() > 0.15).squeeze(-1)
    assert torch.equal(action.long().argmax(-1)[clear] - 1, given.round().long().squeeze(-1)[clear])


# -- against twins --------------------------------------------------------------------------


def batch_of(n=16):
    terminated = torch.rand(n, 1) < 0.4
    after = {"features": torch.randn(n, 3), "reward": torch.randn(n, 1)}
    after |= {"terminated": terminated, "done": terminated.clone()}
    now = {"features": torch.randn(n, 3), "action": 2 * torch.rand(n, 1) - 1}
    return TensorDict({**now, "next": after}, [n])


@pytest.mark.parametrize("name", LOSSES)
def test_steps_are_those_of_a_loop_by_hand(name):
    """With an optimizer each for actor and critics, as TorchRL's own scripts have it."""
    make, options = LOSSES[name]
    every, targets_every = options.get("actor_every", 1), options.get("targets_every", 1)
    torch.manual_seed(1)
    learner = learner_of(make, gamma=0.9, **options)(3, Bounded(-2.0, 2.0, (1,)))
    torch.manual_seed(1)
    twin = make(3, Bounded(-2.0, 2.0, (1,)))
    twin.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
    named = dict(twin.named_parameters())
    assert {k: v.shape for k, v in learner.loss.named_parameters()} == {
        k: v.shape for k, v in named.items()
    }
    acting = [p for k, p in named.items() if "actor_network" in k or "alpha" in k]
    others = [p for k, p in named.items() if "actor_network" not in k and "alpha" not in k]
    critics, actor = (torch.optim.Adam(part, 1e-2, fused=True) for part in (others, acting))
    targets = None if name == "CrossQ" else SoftUpdate(twin, tau=0.005)
    for i in range(1, 7):
        batch = batch_of()
        torch.manual_seed(i)
        learner.update(batch.clone())
        torch.manual_seed(i)
        terms = twin(batch.clone())
        for optim in (critics, actor):
            optim.zero_grad()
        sum(terms[k] for k in terms.keys() if k.startswith("loss")).backward()
        critics.step()
        if i % every == 0:
            actor.step()
        if targets is not None and i % targets_every == 0:
            targets.step()
    theirs = twin.state_dict()
    for key, value in learner.loss.state_dict().items():
        torch.testing.assert_close(value, theirs[key], msg=key)


def test_the_turns_go_on_after_a_save():
    def run(saved=None):
        torch.manual_seed(0)
        level = model_free_level(
            *SPACES, learner_factory=learner_of(td3, actor_every=2, targets_every=3)
        )
        if saved is not None:
            level.load_state_dict(saved[0])
            level.optim.load_state_dict(saved[1])
        return level

    data = [make_transitions(50), make_transitions(10)]
    first = run()
    first.learn(data[0])  # five updates
    second = run((copy.deepcopy(first.state_dict()), copy.deepcopy(first.optim.state_dict())))
    second.buffer.extend(data[0])
    for level in (first, second):
        torch.manual_seed(3)
        level.learn(data[1])
    assert int(second.learner.n_updates) == 6
    torch.testing.assert_close(second.state_dict(), first.state_dict())


@pytest.mark.parametrize("factory", [SACLearner, lambda *a, **o: learner_of(td3, **o)(*a)])
def test_the_learning_rate_may_depend_on_the_environment_steps(factory):
    rates = {0: 1.0, 40: 0.5, 80: 0.0, 120: 0.25}
    level = model_free_level(*SPACES, learner_factory=partial(factory, lr=rates.__getitem__))
    for steps in (40, 80, 120):
        before = copy.deepcopy(dict(level.learner.named_parameters()))
        level.learn(make_transitions(40))
        assert {group["lr"] for group in level.optim.param_groups} == {rates[steps]}
        still = all(torch.equal(p, before[k]) for k, p in level.learner.named_parameters())
        assert still == (steps == 80)
    rates[160] = -1.0
    with unchanged(level), pytest.raises(ValueError, match=r"lr\(n_env_steps\) .* -1"):
        level.learn(make_transitions(40))


# -- acting ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "options"), [(0.1, {}), (0.3, {"exploration": 0.3})])
def test_it_explores_by_noise_in_units_of_half_the_range(scale, options):
    spec = Bounded(-20.0, 20.0, (1,))
    learner = learner_of(td3, **options)(3, spec)
    features = torch.randn(1, 3).expand(5000, 3)
    calm = learner.act(features, explore=False)
    assert (calm == calm[0]).all()
    assert abs((learner.act(features, explore=True) - calm).std() / (20 * scale) - 1) < 0.05


def test_a_distribution_is_sampled_and_choices_are_random_at_times():
    features = torch.randn(1, 3).expand(4000, 3)
    learner = learner_of(soft(SACLoss))(3, Bounded(-1.0, 1.0, (1,)))
    assert len(learner.act(features, explore=True).unique()) > 3000
    assert len(learner.act(features, explore=False).unique()) == 1
    for share in (0.0, 0.6):
        make = lambda n_in, _: dqn(n_in, OneHot(3))  # noqa: E731
        learner = LossLearner(make(3, None), OneHot(3), exploration=share)
        action = learner.act(features, explore=True).long().argmax(-1)
        other = (action != learner.act(features, explore=False).long().argmax(-1)).float().mean()
        assert abs(other - share * 2 / 3) < 0.04


@pytest.mark.parametrize("explore", [False, True])
@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        (LossLearner, Bounded(-3.0, 1.0, (2,))),
        *(
            (kind, spec)
            for kind in (LossLearner, DQNLearner)
            for spec in (OneHot(3), Categorical(3))
        ),
    ],
)
def test_actions_of_any_batch_are_those_of_its_rows(kind, spec, explore):
    """Also while exploring by noise or choices, which are drawn row by row."""
    if kind is DQNLearner:
        learner = DQNLearner(3, spec, epsilon=0.5)
    else:
        net = (
            None
            if isinstance(spec, Bounded)
            else QValueActor(mlp(3, 3), in_keys=["features"], spec=spec)
        )
        loss = td3(3, spec) if net is None else DQNLoss(net, action_space=spec)
        learner = LossLearner(loss, spec, exploration=0.5)
    features = torch.randn(2, 3, 4, 3)
    torch.manual_seed(1)
    rows = learner.act(features.reshape(-1, 3), explore=explore)
    for batch in ((24,), (2, 12), (2, 3, 4)):
        torch.manual_seed(1)
        action = learner.act(features.reshape(*batch, 3), explore=explore)
        assert action.shape == (*batch, *spec.shape)
        torch.testing.assert_close(action.reshape(rows.shape), rows)
        assert spec.is_in(action)
        assert action.dtype == spec.dtype


@pytest.mark.parametrize("name", LOSSES)
def test_terms_are_numbers_that_keep_no_graph(name):
    make, options = LOSSES[name]
    terms = learner_of(make, **options)(3, Bounded(-1.0, 1.0, (1,))).update(batch_of())
    assert sum(term.startswith("loss") for term in terms) > 1
    assert all(value.ndim == 0 and not value.requires_grad for value in terms.values())


def test_acting_changes_nothing_and_each_row_acts_alone_with_batch_norm():
    def make(n_in, spec):
        net = nn.Sequential(nn.BatchNorm1d(n_in), mlp(n_in, 2), NormalParamExtractor())
        actor = ProbabilisticActor(
            TensorDictModule(net, ["features"], ["loc", "scale"]),
            in_keys=["loc", "scale"],
            distribution_class=TanhNormal,
            return_log_prob=True,
        )
        return CrossQLoss(actor, normed(n_in, spec), action_spec=spec)

    learner = learner_of(make)(3, Bounded(-1.0, 1.0, (1,)))
    with unchanged(learner):
        learner.act(torch.randn(8, 3), explore=False)
    learner.train()
    seen = learner.state_dict()["loss.actor_network_params.module.0.module.0.running_mean"].clone()
    learner.update(batch_of())
    key = "loss.actor_network_params.module.0.module.0.running_mean"
    assert not torch.equal(learner.state_dict()[key], seen)
    features = torch.randn(8, 3)
    with unchanged(learner):
        action = learner.act(features, explore=False)
    alone = torch.stack([learner.act(x, explore=False) for x in features.split(1)]).squeeze(1)
    torch.testing.assert_close(action, alone)


@pytest.mark.parametrize("name", LOSSES)
def test_copies_act_and_do_not_learn(name):
    make, options = LOSSES[name]
    learner = LossLearner(make(3, SPACES[1]), SPACES[1], **options)
    features, before = torch.randn(5, 3), copy.deepcopy(learner.state_dict())
    for other in (copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))):
        expected = learner.act(features, explore=False)
        assert torch.equal(other.act(features, explore=False), expected)
        with pytest.raises(RuntimeError, match="is a copy for acting"):
            other.update(batch_of())
    learner.update(batch_of())
    assert before.keys() == learner.state_dict().keys()


# -- bad input ------------------------------------------------------------------------------


def box(**options):
    return lambda make: LossLearner(make(3, SPACES[1]), SPACES[1], **options)


def reads(key):
    def make(n_in, spec):
        return TD3Loss(
            TensorDictModule(nn.Linear(n_in, 1), [key], ["action"]),
            ValueOperator(nn.Linear(n_in + 1, 1), in_keys=[key, "action"]),
            bounds=(-1.0, 1.0),
        )

    return make


def none_reduced(*spaces):
    return TD3Loss(deterministic(*spaces), critic(*spaces), bounds=(-1.0, 1.0), reduction="none")


@pytest.mark.parametrize(
    ("make", "build", "error", "message"),
    [
        (lambda *_: nn.Linear(1, 1), box(), TypeError, "TD3Loss"),
        (reads("observation"), box(), ValueError, r"reads \['observation'\].*'features'"),
        (none_reduced, box(), ValueError, "reduction='none'"),
        (td3, box(policy="net"), ValueError, r"no policy named net.*'actor_network'"),
        (td3, box(exploration=-1.0), ValueError, "exploration"),
        (
            dqn,
            lambda m: LossLearner(m(3, 0), OneHot(3), exploration=1.5),
            ValueError,
            "exploration",
        ),
        (td3, box(actor_every=0), ValueError, "actor_every"),
        (soft(CrossQLoss, normed), box(tau=0.1), ValueError, "has no target networks"),
        (soft(CrossQLoss, normed), box(targets_every=2), ValueError, "has no target networks"),
        (dqn, lambda m: LossLearner(m(3, None), OneHot(3), actor_every=2), ValueError, "actor"),
        (td3, lambda m: LossLearner(m(3, SPACES[1]), Unbounded((1,))), TypeError, "bounds"),
    ],
)
def test_what_does_not_fit_is_refused(make, build, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        build(make)


def test_an_optimizer_of_ones_own_is_used():
    make = partial(torch.optim.SGD, momentum=0.5)
    learner = LossLearner(td3(3, SPACES[1]), SPACES[1], lr=0.1, optim_factory=make)
    assert isinstance(learner.optim, torch.optim.SGD)
    assert {(g["lr"], g["momentum"]) for g in learner.optim.param_groups} == {(0.1, 0.5)}


@pytest.mark.parametrize("kind", [REDQLoss, TQCLoss, SACLoss])
def test_a_loss_that_cannot_tell_its_target_entropy_is_named(kind):
    def make(n_in, spec):
        n_out = 5 if kind is TQCLoss else 1
        return LossLearner(kind(gaussian(n_in, spec), critic(n_in, spec, n_out)), spec)

    with pytest.raises(ValueError, match=rf"{kind.__name__} .*target_entropy=-1.0, minus"):
        model_free_level(*SPACES, learner_factory=make)


@pytest.mark.parametrize(
    ("make", "spec", "dtype"),
    [
        (lambda n_in, spec: dqn(n_in, OneHot(3)), Bounded(-1.0, 1.0, (1,)), "int64|torch.bool"),
        (lambda n_in, spec: td3(n_in, Bounded(-1.0, 1.0, (1,))), Categorical(3), "float32"),
    ],
)
def test_a_policy_for_other_actions_is_named(make, spec, dtype):
    """A continuous action would have been rounded to a choice."""
    message = rf"writes torch.({dtype}), but the level's actions are"
    with pytest.raises(ValueError, match=message):
        model_free_level(SPACES[0], spec, learner_factory=learner_of(make))
    with pytest.raises(TypeError, match=message):
        learner_of(make)(2, spec).act(torch.zeros(4, 2), explore=True)
