"""Planners in worlds that are known exactly: optima, options, batches, memory, bad input."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from helpers import known, make_point, make_predictor, observed
from plans import first, gamble
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import Bounded, Categorical, OneHot, Unbounded
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import CEMPlanner as TorchRLCEM
from torchrl.modules import MPPIPlanner as TorchRLMPPI
from torchrl.modules.planners.common import MPCPlannerBase
from torchrl.objectives.value import TDLambdaEstimator

from layeredrl_torchrl import Expectation, PredictorEnv
from layeredrl_torchrl.optimizers import CEM, GaussianSearch
from layeredrl_torchrl.planners import (
    CEMPlanner,
    ICEMPlanner,
    Mean,
    MPPIPlanner,
    PredictorPlanner,
    best_plan,
    mean_plan,
)
from layeredrl_torchrl.predictors import ReturnOptions
from layeredrl_torchrl.specs import action_features

# -- the optimum ----------------------------------------------------------------------------------


def ours(kind):
    def build(predictor):
        return kind(predictor, horizon=6, n_samples=200, use_value_func=True)

    return build


def torchrl_cem(predictor):
    env = PredictorEnv(predictor, use_value_func=True, discount=1.0)
    return TorchRLCEM(env, planning_horizon=6, optim_steps=8, num_candidates=300, top_k=20)


def torchrl_mppi(predictor):
    zero = TensorDictModule(lambda x: 0 * x[..., :1], in_keys=["state"], out_keys=["state_value"])
    advantage = TDLambdaEstimator(gamma=1.0, lmbda=1.0, value_network=zero)
    env = PredictorEnv(predictor, use_value_func=True, discount=1.0)
    options = {"planning_horizon": 6, "optim_steps": 8, "num_candidates": 300, "top_k": 20}
    return TorchRLMPPI(env, advantage, temperature=2.0, **options)


@pytest.mark.parametrize(
    "build",
    [ours(CEMPlanner), ours(ICEMPlanner), ours(MPPIPlanner), torchrl_cem, torchrl_mppi],
    ids=["cem", "icem", "mppi", "torchrl cem", "torchrl mppi"],
)
def test_all_planners_reach_the_linear_quadratic_optimum(linear, build):
    """With the value of the Riccati equation at its end, every plan's beginning is optimal."""
    predictor, cost_to_go = linear
    planner = build(predictor)
    start = torch.tensor([[1.0, 0.0], [-0.5, 1.0], [0.3, -0.8], [-1.0, -0.5]])
    x, paid = start, torch.zeros(4)
    td = observed(planner, x) if isinstance(planner, PredictorPlanner) else None
    for _ in range(12):
        if td is None:
            with torch.no_grad():
                td_in = TensorDict(state=x, context=x[:, :0], batch_size=[4])
                action = planner(td_in)["action"]
        else:
            td["observation"] = x
            action = planner(td)["action"].clone()
            td["planner"] = td["next", "planner"]
        paid = paid - predictor.rew_func(x, None, action)
        (x, _), *_ = predictor.model.predict_members(x, None, action)
        x = x.squeeze(-2)
    excess = (paid + cost_to_go(x)) / cost_to_go(start) - 1.0
    assert (excess > -1e-4).all()  # nothing is better than the optimum
    assert (excess < 0.02).all(), excess


@pytest.mark.parametrize("action_key", ["action", ("agent", "action")])
def test_the_first_move_of_a_point_is_the_best(kind, action_key):
    planner = kind(make_point(), horizon=4, action_key=action_key)
    obs = torch.tensor([[0.0, 0.2], [0.3, 0.1], [0.0, 5.0], [0.0, -5.0], [1.0, 1.0], [-2.0, -2.4]])
    td = observed(planner, obs.view(2, 3, 2))
    before = td.clone()
    torch.manual_seed(1)
    alone = planner.planning(td)
    assert (td == before).all()  # planning alone writes nothing
    assert td.keys() == before.keys()
    torch.manual_seed(1)
    target = TensorDict(batch_size=[2, 3])
    assert planner(td, tensordict_out=target) is target
    assert torch.equal(target[action_key], alone)
    assert td.keys() == before.keys()

    out = planner(td)

    assert isinstance(planner, MPCPlannerBase)
    assert out is td
    action = td[action_key]
    best = (2 * (obs[:, 1:] - obs[:, :1])).clamp(-1, 1).view(2, 3, 1)
    assert action.shape == (2, 3, 1)
    torch.testing.assert_close(action, best, atol=0.1, rtol=0)
    assert planner.action_spec.is_in(action)
    assert (td.select("observation", "planner") == before).all()
    assert td["next", "planner", "warm"].all()
    assert set(planner.out_keys) | set(planner.in_keys) == set(td.keys(True, True))


# -- discrete actions -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "space",
    [OneHot(3), Categorical(3), Categorical(3, (1,))],
    ids=["one-hot", "integer", "integer with an axis"],
)
def test_the_best_of_discrete_actions_is_found(kind, space):
    """A walker on a line goes left, stays, or goes right: action 0, 1, 2."""

    def walk(state, action):
        return state + action_features(space, action, state.dtype).argmax(-1, keepdim=True) - 1.0

    predictor = known(walk, lambda s, c, a: -s.abs().sum(-1), space)
    planner = kind(predictor, horizon=4, n_samples=100)
    obs = torch.tensor([-3.0, 0.0, 2.0, 1.0, -1.0, 0.0]).view(2, 3, 1)
    action = planner(observed(planner, obs))["action"]
    assert action.shape == (2, 3, *space.shape)
    assert planner.action_spec.is_in(action)
    if isinstance(space, OneHot):
        action = action.float().argmax(-1)
    assert torch.equal(action.reshape(2, 3), 1 - obs.squeeze(-1).sign().long())


# -- batches, memory, randomness ------------------------------------------------------------------


def test_the_memory_is_handed_on_one_step_later(kind):
    planner = kind(make_point(), horizon=3)
    td = observed(planner, torch.randn(2, 2))
    torch.manual_seed(5)
    _, solution = planner.plan(td)
    torch.manual_seed(5)
    planner(td)
    mean = solution.memory["mean"]
    expected = torch.stack((mean[:, 1], mean[:, 2], mean[:, 2]), 1)
    assert torch.equal(td["next", "planner", "mean"], expected)


def test_plans_follow_the_seed_and_leave_gradients_and_modes_alone(kind):
    predictor = make_predictor()
    predictor.model.eval()
    planner = kind(predictor, horizon=3, n_samples=20, use_value_func=True)
    modes = {name: m.training for name, m in predictor.named_modules()}
    td = observed(planner, torch.randn(2, 2))
    actions = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        actions.append(planner(td)["action"].clone())
    assert torch.equal(actions[0], actions[1])
    assert not torch.equal(actions[0], actions[2])
    assert not actions[0].requires_grad
    assert {name: m.training for name, m in predictor.named_modules()} == modes
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = planner(td)["action"]
    assert half.dtype == torch.float32
    assert planner.action_spec.is_in(half)


def test_defaults_are_those_that_are_documented(kind):
    """What a plan is by default decides what anybody's agent does."""
    planner = kind(make_point())
    optimizer = planner.optimizer
    ours = {
        CEMPlanner: (mean_plan, (256,) * 6, 0),
        ICEMPlanner: (best_plan, (256, 205, 164, 131, 105, 84), 8),
        MPPIPlanner: (mean_plan, (256,) * 6, 0),
    }[kind]
    assert (planner.return_mode, optimizer.populations, optimizer.n_kept) == ours
    assert (optimizer.horizon, optimizer.n_elites, optimizer.momentum) == (15, 26, 0.1)
    assert planner.options == ReturnOptions()
    assert planner.risk == Mean()
    assert planner.proposal is planner.callback is None
    if kind is MPPIPlanner:
        assert optimizer.temperature == 1.0
    if kind is ICEMPlanner:
        assert optimizer.beta == 1.0
    plain = PredictorPlanner(make_point(), optimizer)
    assert (plain.return_mode, plain.options) == (best_plan, ReturnOptions())


# -- every option has an effect -------------------------------------------------------------------


def test_a_return_mode_chooses_what_is_played():
    predictor, obs = make_point(), torch.randn(3, 2)
    for name in ("mean", "best", "random"):
        planner = CEMPlanner(predictor, horizon=3, n_samples=30, return_mode=name)
        actions, solution = planner.plan(observed(planner, obs))
        assert torch.equal(actions, getattr(solution, name))
    for function, name in ((mean_plan, "mean"), (best_plan, "best"), (lambda s: -s.best, None)):
        planner = CEMPlanner(predictor, horizon=3, n_samples=30, return_mode=function)
        actions, solution = planner.plan(observed(planner, obs))
        assert torch.equal(actions, getattr(solution, name) if name else -solution.best)


@pytest.mark.parametrize("how", [None, *ExplorationType])
@pytest.mark.parametrize("chosen", [{}, {"deterministic_mode": "random"}], ids=["", "chosen"])
def test_the_exploration_type_of_torchrl_chooses_the_return_mode(how, chosen):
    predictor, obs = make_point(), torch.randn(3, 2)
    planner = ICEMPlanner(predictor, horizon=3, n_samples=30, **chosen)
    # What an Evaluator, which asks for DETERMINISTIC, and a collector, for RANDOM, would play.
    with nullcontext() if how is None else set_exploration_type(how):
        actions, solution = planner.plan(observed(planner, obs))
    other = chosen.get("deterministic_mode", "mean")
    expected = "best" if how in (None, ExplorationType.RANDOM) else other
    assert torch.equal(actions, getattr(solution, expected))
    names = {"mean", "best", "random"} - {expected}
    assert not any(torch.equal(actions, getattr(solution, name)) for name in names)


def test_the_callback_sees_the_plan_and_changes_nothing(kind):
    predictor = make_predictor(model={"n_models": 3, "n_particles_per_model": 2})
    seen, results = [], []
    for callback in (None, seen.append):
        options = {"callback": callback, "propagation": Expectation()}
        planner = kind(predictor, horizon=4, n_samples=20, **options)
        td = observed(planner, torch.ones(2, 2))
        torch.manual_seed(0)
        results.append([planner(td)["action"].clone() for _ in range(2)])
    for with_, without in zip(*results, strict=True):
        assert torch.equal(with_, without)
    assert len(seen) == 2
    assert seen[0].batch_size == (2, 1, 1, 4)
    assert torch.equal(seen[0]["action"][:, 0, 0, 0], results[0][0])
    assert torch.equal(seen[0]["state"][:, 0, 0, 0], torch.ones(2, 2))
    assert ("next", "reward") in seen[0].keys(True)


@pytest.mark.parametrize("sigma", [0.01, 0.5])
def test_the_first_samples_have_the_given_sigma(kind, sigma):
    planner = kind(make_point(), horizon=2, n_samples=400, n_iterations=1, initial_sigma=sigma)
    seen = []
    planner.predictor.rew_func = lambda s, c, a: seen.append(a) or s[..., 0]
    planner(observed(planner, torch.zeros(2, 2)))
    first_step = seen[0].flatten()
    assert first_step.std().item() == pytest.approx(sigma, rel=0.15)


def test_each_dimension_has_its_own_bounds(kind):
    low, high = torch.tensor([-0.1, 2.0]), torch.tensor([0.3, 7.0])
    free = Bounded(low, high, (2,))
    predictor = known(
        lambda state, action: state + action, lambda s, c, a: a.sum(-1), free, width=2
    )
    obs = torch.zeros(2, 2)
    action = first(kind, predictor, obs)
    torch.testing.assert_close(action, high.expand(2, 2), atol=0.1, rtol=0)
    narrow = Bounded(low, low + 0.05, (2,))
    action = first(kind, predictor, obs, action_spec=narrow)
    assert narrow.is_in(action)
    torch.testing.assert_close(action, (low + 0.05).expand(2, 2), atol=0.02, rtol=0)


# -- bad input ------------------------------------------------------------------------------------


def test_a_missing_primer_is_named(kind):
    planner = kind(make_point(), horizon=2)
    td = observed(planner, torch.randn(3, 2))
    with pytest.raises(KeyError, match="make_tensordict_primer"):
        planner(td.exclude("planner"))
    with pytest.raises(KeyError, match="observation"):
        planner(td.exclude("observation"))
    with pytest.raises(ValueError, match="'mean' has shape"):
        planner(observed(kind(make_point(), horizon=5), torch.randn(3, 2)))


@pytest.mark.parametrize(
    "reward", [lambda s, c, a: s[..., 0], lambda s, c, a: s.nan_to_num()[..., 0]]
)
def test_nan_from_a_member_is_an_error_that_names_it(kind, reward):
    """The second of three members predicts NaN for some actions."""

    def spoil(after, action):
        second = torch.where(action[1] > 0.5, torch.nan, after[1])
        return torch.stack([after[0], second, after[2]])

    predictor = gamble(reward, spoil, n_models=3)
    with pytest.raises(ValueError, match=r"member(\(s\))? \[?1"):
        first(kind, predictor, torch.zeros(2, 1))


def test_a_reward_that_is_nan_is_an_error(kind):
    predictor = make_point(rew_func=lambda s, c, a: torch.where(a > 0.5, torch.nan, a)[..., 0])
    with pytest.raises(ValueError, match=r"not finite|NaN|non-finite"):
        first(kind, predictor, torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("parts", "options", "error", "match"),
    [
        ({}, {"action_spec": Unbounded((1,))}, ValueError, "bounds"),
        ({}, {"action_spec": Bounded(-math.inf, 1, (1,))}, ValueError, "bounds"),
        ({}, {"action_spec": Bounded(-1, 1, (2,))}, ValueError, "action_spec"),
        ({}, {"use_value_func": True}, ValueError, "val_func"),
        ({"rew_func": None}, {}, ValueError, "rew_func"),
        ({}, {"horizn": 3}, TypeError, "horizn"),
    ],
)
def test_what_does_not_fit_is_refused(kind, parts, options, error, match):
    with pytest.raises(error, match=match):
        kind(make_point(**parts), **options)


@pytest.mark.parametrize("mode", [lambda s: s.mean[..., 0, :], lambda s: s.mean.tolist()])
def test_a_return_mode_gives_a_sequence(kind, mode):
    planner = kind(make_point(), horizon=2, n_samples=24, return_mode=mode)
    with pytest.raises(ValueError, match=r"return mode gave .* whole sequence, \(3, 2, 1\)"):
        planner(TensorDict({"observation": torch.zeros(3, 2)}, [3]).update(planner.forget([3])))


def test_a_memory_of_another_kind_is_named(kind):
    planner = kind(make_point(), horizon=2, n_samples=24)
    td = TensorDict({"observation": torch.zeros(3, 2), "planner": torch.zeros(3, 2)}, [3])
    with pytest.raises(TypeError, match=r"memory 'planner'.*Tensor.*planner\.forget\(\)"):
        planner(td)


def test_there_is_one_memory_for_each_observation(kind):
    planner = kind(make_point(), horizon=2, n_samples=24)
    td = TensorDict({"observation": torch.zeros(4, 2)}).update(planner.forget())
    with pytest.raises(ValueError, match=r"\[4\] observations, but memories of \[\] plans"):
        planner(td)


def test_an_optimizer_for_other_actions_is_refused():
    search = GaussianSearch(-torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="make_search"):
        PredictorPlanner(make_point(), CEM(search, 3))
    with pytest.raises(TypeError, match="Optimizer"):
        PredictorPlanner(make_point(), "cem")
