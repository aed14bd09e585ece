"""How plans are scored: termination, discount, value, bonus and risk, in worlds that are known."""

from __future__ import annotations

import pytest
import torch
from helpers import make_point, make_predictor, observed
from plans import first, gamble

from layeredrl_torchrl import Expectation, TSInfinity
from layeredrl_torchrl.planners import CEMPlanner, CVaR, Mean, RiskMeasure, WorstCase


def ends_beyond(limit):
    return lambda after: (after > limit).float()


def treasure(state, context, action):
    """Worth 5 a step beyond 0.8; moving costs."""
    return 5.0 * (state > 0.8)[..., 0].float() - action[..., 0] ** 2


def test_term_prob_and_discount_count(kind):
    mortal, obs = make_point(ends_beyond(0.8), rew_func=treasure), torch.zeros(2, 2)
    wide = {"initial_sigma": 1.0}  # two great moves are needed for it
    dead = first(kind, mortal, obs, **wide)
    fearless = first(kind, mortal, obs, use_term_prob=False, **wide)
    assert (dead.abs() < 0.15).all()  # the dead cannot take the treasure
    assert (fearless > 0.5).all()
    immortal = make_point(rew_func=treasure)
    assert (first(kind, immortal, obs, **wide) > 0.5).all()
    assert (first(kind, immortal, obs, discount=0.1, **wide).abs() < 0.15).all()


def test_the_value_function_stands_in_for_the_horizon(kind):
    predictor = make_point(val_func=lambda s, c, a: -((s - c)[..., 0] ** 2))
    obs = torch.tensor([[0.0, 0.3], [0.5, 0.2]])
    action = first(kind, predictor, obs, horizon=1, use_value_func=True)
    torch.testing.assert_close(action, torch.tensor([[0.6], [-0.6]]), atol=0.1, rtol=0)
    assert predictor.terminal_value is predictor.val_func


def test_an_exploration_bonus_is_added(kind):
    predictor, obs = make_point(rew_func=lambda s, c, a: -(a[..., 0] ** 2)), torch.zeros(2, 2)

    def bonus(state, context, action):
        return 1.2 * action[..., 0]

    assert (first(kind, predictor, obs).abs() < 0.15).all()
    explored = first(kind, predictor, obs, exploration_bonus=bonus)
    torch.testing.assert_close(explored, torch.full((2, 1), 0.6), atol=0.15, rtol=0)


@pytest.mark.parametrize(
    ("options", "bold"),
    [
        ({}, True),
        ({"risk": Mean()}, True),
        ({"risk": WorstCase()}, False),
        ({"risk": CVaR(0.5)}, False),
        ({"risk": WorstCase(), "propagation": TSInfinity()}, False),
        # Members that are averaged at each step do not differ, so that there is no risk.
        ({"risk": WorstCase(), "propagation": Expectation()}, True),
    ],
)
def test_risk_and_propagation_decide_whether_to_gamble(kind, options, bold):
    options = {"horizon": 2, "return_mode": "mean", "n_iterations": 10} | options
    action = first(kind, gamble(), torch.zeros(2, 1), **options)
    assert (action > 0.7 if bold else action < 0.1).all()


class LastMember(RiskMeasure):
    def __call__(self, returns):
        return returns[..., -1, :]


@pytest.mark.parametrize(
    ("risk", "message"),
    [
        (
            LastMember(),
            r"risk \(LastMember\) gave torch.float32 \(1, 2, 1\) for .*\(1, 2\); reduce",
        ),
        (lambda returns: returns.mean(), r"risk \(<lambda>\) gave torch.float32 \(\) for"),
        (lambda returns: returns.flatten(-2).min(-1), r"risk \(<lambda>\) gave a min for"),
        (lambda returns: (returns > 0).all(-1).all(-1), r"gave torch.bool \(1, 2\) for"),
    ],
)
def test_a_risk_that_gives_something_else_is_refused_when_built(kind, risk, message):
    with pytest.raises(ValueError, match=message):
        kind(gamble(), horizon=2, n_samples=200, risk=risk)


@pytest.mark.parametrize(
    ("propagation", "spread"), [(None, (4, 3)), (TSInfinity(5), (4, 5)), (Expectation(), (1, 1))]
)
def test_a_risk_is_tried_on_as_many_particles_as_it_will_be_given(propagation, spread):
    seen = []
    predictor = make_predictor(model={"n_models": 4, "n_particles_per_model": 3})

    def mean(returns):
        seen.append(tuple(returns.shape[-2:]))
        return returns.mean((-2, -1))

    planner = CEMPlanner(predictor, horizon=2, n_samples=20, risk=mean, propagation=propagation)
    assert seen == [spread]
    planner(observed(planner, torch.zeros(2, 2)))
    assert set(seen) == {spread}


def test_a_risk_may_count():
    """An integer for each plan is as good as a float."""
    lost = lambda returns: -(returns < 0).sum((-2, -1))  # noqa: E731
    action = first(CEMPlanner, gamble(), torch.zeros(2, 1), horizon=2, risk=lost)
    assert (action < 0.1).all()


def test_deterministic_plans_follow_the_means():
    predictor = make_predictor()
    torch.nn.init.normal_(predictor.rew_func.net[-1].weight)
    costs = {}
    for deterministic in (False, True):
        planner = CEMPlanner(predictor, horizon=3, n_samples=20, deterministic=deterministic)
        td = observed(planner, torch.ones(1, 2))
        noise = planner.optimizer.draw_noise((1,))
        costs[deterministic] = [planner.plan(td, noise)[1].best_cost for _ in range(2)]
    assert torch.equal(*costs[True])
    assert not torch.equal(*costs[False])
