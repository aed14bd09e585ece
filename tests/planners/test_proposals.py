"""Planners that are told what a policy would do."""

from __future__ import annotations

import pytest
import torch
from helpers import known, make_point, observed
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Bounded, OneHot, Unbounded
from torchrl.envs import ExplorationType, set_exploration_type
from torchrl.modules import ProbabilisticActor, TanhNormal

from layeredrl_torchrl import (
    ICEMPlanner,
    IdentityEncoder,
    PolicyProposal,
    ProbabilisticEnsemble,
    StaticPredictor,
)

GAIN = torch.tensor([[-0.8, -0.9]])


def linear_policy(state, context):
    return (state @ GAIN.mT).clamp(-4, 4)


def make_policy(function=linear_policy, in_keys=("state", "context"), out_keys=("action",)):
    return TensorDictModule(function, list(in_keys), list(out_keys))


@pytest.fixture
def noisy_actor():
    """A stochastic actor of the linear world, as SAC has it."""
    torch.manual_seed(0)
    return ProbabilisticActor(
        TensorDictSequential(
            TensorDictModule(nn.Linear(2, 2), ["state"], ["params"]),
            TensorDictModule(NormalParamExtractor(), ["params"], ["loc", "scale"]),
        ),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": -4.0, "high": 4.0},
    )


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_a_policy_is_played_in_the_predictor(linear, batch):
    """Against a loop over the world's own steps, one start at a time."""
    predictor, _ = linear
    state = torch.randn(*batch, 2)
    actions = PolicyProposal(predictor, make_policy(), n=2)(state, state[..., :0], 5)
    assert actions.shape == (*batch, 2, 5, 1)
    for i, x in enumerate(state.reshape(-1, 2)):
        for h in range(5):
            u = linear_policy(x, None)
            for found in actions.reshape(-1, 2, 5, 1)[i, :, h]:
                torch.testing.assert_close(found, u)
            x = predictor.model.after(x, u)


def test_the_middle_of_a_stochastic_policy_comes_first(linear, noisy_actor):
    predictor, _ = linear
    state = torch.randn(2)
    proposal = PolicyProposal(predictor, noisy_actor, n=5)
    for how in (ExplorationType.RANDOM, ExplorationType.DETERMINISTIC):
        with set_exploration_type(how):  # whatever the caller wants for itself
            first, second = proposal(state, state[:0], 4), proposal(state, state[:0], 4)
        assert torch.equal(first[0], second[0])
        assert not torch.isclose(first[1:], second[1:]).any()
        assert len(first.unique(dim=0)) == 5
    assert len(PolicyProposal(predictor, noisy_actor)(state, state[:0], 4)) == 8
    only = PolicyProposal(predictor, noisy_actor, n=1)(state, state[:0], 4)
    torch.testing.assert_close(only[0], first[0])


def test_a_plan_is_no_worse_than_what_was_proposed(linear):
    """With hardly any candidates of its own a planner is as good as the policy, no longer lost."""
    predictor, _ = linear
    torch.manual_seed(0)
    options = {"horizon": 10, "n_samples": 20, "n_iterations": 1, "use_value_func": True}
    obs = torch.randn(8, 2)
    proposal = PolicyProposal(predictor, make_policy(), n=1)
    proposed = proposal(obs, obs[:, :0], 10)[:, 0]

    def score(actions):
        return predictor.returns(obs, None, actions, use_value_func=True).mean((-2, -1))

    scores = {}
    for name, given in (("plain", None), ("told", proposal)):
        planner = ICEMPlanner(predictor, proposal=given, **options)
        td = observed(planner, obs)
        torch.manual_seed(1)
        actions, _ = planner.plan(td)
        scores[name] = score(actions)
    assert (scores["told"] >= score(proposed) - 1e-5).all()
    assert (scores["told"] >= scores["plain"] - 1e-5).all()
    assert scores["told"].mean() > scores["plain"].mean() + 0.1


def test_a_plain_function_proposes_too(linear):
    """It is called once a plan, with the encoded observation and the horizon."""
    predictor, _ = linear
    calls = []

    def proposal(state, context, horizon):
        calls.append((state.shape, context.shape, horizon))
        return torch.full((*state.shape[:-1], 2, horizon, 1), 9.0)

    planner = ICEMPlanner(predictor, horizon=3, n_iterations=2, proposal=proposal)
    planner(observed(planner, torch.randn(4, 2)))
    assert calls == [((4, 2), (4, 0), 3)]


def test_bad_proposals_are_refused(linear):
    predictor, _ = linear
    with pytest.raises(TypeError, match="TensorDictModule"):
        PolicyProposal(predictor, nn.Linear(2, 1))
    with pytest.raises(ValueError, match=r"reads \['observation'\].*encoder"):
        PolicyProposal(predictor, make_policy(lambda x: x, in_keys=["observation"]))
    with pytest.raises(ValueError, match=r"writes \['act'\].*must write 'action'"):
        PolicyProposal(predictor, make_policy(out_keys=["act"]))
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        PolicyProposal(predictor, make_policy(), n=0)
    with pytest.raises(TypeError, match="proposal must be callable or None, got 3"):
        ICEMPlanner(predictor, proposal=3)
    model = ProbabilisticEnsemble(Unbounded((2,)), None, OneHot(3), n_models=2)
    discrete = StaticPredictor(model, None, lambda s, c, a: s[..., 0], IdentityEncoder((2,)), 2)
    with pytest.raises(ValueError, match="continuous"):
        ICEMPlanner(discrete, proposal=lambda s, c, h: s)


def test_a_policy_of_another_task_is_refused_when_it_plans(linear):
    """By its own actions, not by what the world or the search says of them."""
    predictor, _ = linear
    wide = make_policy(lambda state, context: torch.zeros(*state.shape[:-1], 3))
    planner = ICEMPlanner(predictor, horizon=3, proposal=PolicyProposal(predictor, wide))
    with pytest.raises(ValueError, match=r"'action' of shape \(4, 1, 3\), expected \(4, 1, 1\)"):
        planner(observed(planner, torch.randn(4, 2)))


def test_an_action_too_narrow_is_refused_though_the_bounds_would_widen_it():
    predictor = known(
        lambda state, action: state + action,
        lambda state, context, action: state.sum(-1),
        Bounded(-1.0, 1.0, (2,)),
        width=2,
    )
    narrow = make_policy(lambda state, context: state[..., :1])
    with pytest.raises(ValueError, match=r"'action' of shape \(4, 1, 1\), expected \(4, 1, 2\)"):
        PolicyProposal(predictor, narrow)(torch.randn(4, 2), torch.zeros(4, 0), 3)


def test_a_policy_without_bounds_is_imagined_within_them():
    policy = TensorDictModule(
        lambda state, goal: 9 * (goal - state), ["state", "context"], ["action"]
    )
    predictor = make_point()
    start, goal = torch.zeros(1, 1), torch.ones(1, 1)
    found = PolicyProposal(predictor, policy, n=1)(start, goal, 4)
    for h in range(4):
        action = (9 * (goal - start)).clamp(-1.0, 1.0)
        torch.testing.assert_close(found[:, 0, h], action)
        start = predictor.model.predict(start, goal, action)[0][:, 0, 0]
