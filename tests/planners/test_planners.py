"""Planners in worlds that are known exactly: optima, options, batches, memory, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import Bounded, Categorical, OneHot, Unbounded
from torchrl.modules import CEMPlanner as TorchRLCEM
from torchrl.modules import MPPIPlanner as TorchRLMPPI
from torchrl.modules.planners.common import MPCPlannerBase
from torchrl.objectives.value import TDLambdaEstimator

from layeredrl_torchrl import (
    Expectation,
    IdentityEncoder,
    Model,
    PredictorEnv,
    StaticPredictor,
    TSInfinity,
)
from layeredrl_torchrl.optimizers import CEM, GaussianSearch
from layeredrl_torchrl.planners import (
    CEMPlanner,
    CVaR,
    ICEMPlanner,
    Mean,
    MPPIPlanner,
    PredictorPlanner,
    WorstCase,
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
def test_all_planners_reach_the_linear_quadratic_optimum(linear, observe, build):
    """With the value of the Riccati equation at its end, every plan's beginning is optimal."""
    predictor, cost_to_go = linear
    planner = build(predictor)
    start = torch.tensor([[1.0, 0.0], [-0.5, 1.0], [0.3, -0.8], [-1.0, -0.5]])
    x, paid = start, torch.zeros(4)
    td = observe(planner, x) if isinstance(planner, PredictorPlanner) else None
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


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("action_key", ["action", ("agent", "action")])
def test_the_first_move_of_a_point_is_the_best(make_point, kind, observe, batch, action_key):
    predictor = make_point()
    planner = kind(predictor, horizon=4, action_key=action_key)
    obs = torch.tensor([[0.0, 0.2], [0.3, 0.1], [0.0, 5.0], [0.0, -5.0], [1.0, 1.0], [-2.0, -2.4]])
    obs = obs[: torch.Size(batch).numel()].reshape(*batch, 2)
    td = observe(planner, obs)
    before = td.clone()

    out = planner(td)

    assert isinstance(planner, MPCPlannerBase)
    assert out is td
    action = td[action_key]
    best = (2 * (obs[..., 1:] - obs[..., :1])).clamp(-1, 1)
    assert action.shape == (*batch, 1)
    torch.testing.assert_close(action, best, atol=0.1, rtol=0)
    assert planner.action_spec.is_in(action)
    assert (td.select("observation", "planner") == before).all()
    assert td["next", "planner", "warm"].all()
    assert set(planner.out_keys) | set(planner.in_keys) == set(td.keys(True, True))


def test_planning_alone_writes_nothing(make_point, kind, observe):
    planner = kind(make_point(), horizon=4)
    td = observe(planner, torch.randn(3, 2))
    before = td.clone()
    torch.manual_seed(1)
    action = planner.planning(td)
    assert (td == before).all()
    assert td.keys() == before.keys()
    torch.manual_seed(1)
    target = TensorDict(batch_size=[3])
    assert planner(td, tensordict_out=target) is target
    assert torch.equal(target["action"], action)
    assert "action" not in td.keys()


# -- discrete actions -----------------------------------------------------------------------------


class Walk(Model):
    """A walker on a line goes left, stays, or goes right: action 0, 1, 2."""

    def __init__(self, space):
        super().__init__(Unbounded((1,)), None, space)

    def predict_members(self, state, context, action):
        choice = action_features(self.action_spec, action, state.dtype).argmax(-1, keepdim=True)
        after = (state + choice - 1.0).unsqueeze(-2)
        weights = torch.ones_like(after[..., 0])
        return (after, torch.zeros_like(after)), weights, torch.zeros_like(weights[..., 0])


@pytest.mark.parametrize(
    "space",
    [OneHot(3), Categorical(3), Categorical(3, (1,))],
    ids=["one-hot", "integer", "integer with an axis"],
)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_discrete_actions(kind, observe, space, batch):
    predictor = StaticPredictor(
        Walk(space), None, lambda s, c, a: -s.abs().sum(-1), IdentityEncoder((1,)), 1
    )
    planner = kind(predictor, horizon=4, n_samples=100)
    obs = torch.tensor([-3.0, 0.0, 2.0, 1.0, -1.0, 0.0])
    obs = obs[: torch.Size(batch).numel()].reshape(*batch, 1)
    action = planner(observe(planner, obs))["action"]
    assert action.shape == (*batch, *space.shape)
    assert planner.action_spec.is_in(action)
    if isinstance(space, OneHot):
        action = action.float().argmax(-1)
    assert torch.equal(action.reshape(batch), 1 - obs.squeeze(-1).sign().long())


# -- batches, memory, randomness ------------------------------------------------------------------


def test_resetting_one_instance_leaves_the_others_bit_equal(make_point, kind, observe):
    planner = kind(make_point(), horizon=3, n_samples=40)
    td = observe(planner, torch.randn(3, 2))
    td["planner"] = planner(td.clone())["next", "planner"]
    reset = td.clone()
    reset["planner"][1] = planner.optimizer.forget()
    results = []
    for given in (td, reset):
        torch.manual_seed(3)
        results.append(planner(given))
    for i in (0, 2):
        assert torch.equal(results[0]["action"][i], results[1]["action"][i])
        assert (results[0]["next", "planner"][i] == results[1]["next", "planner"][i]).all()
    moved = results[0]["next", "planner", "mean"][1] - results[1]["next", "planner", "mean"][1]
    assert moved.abs().max() > 0


def test_the_memory_is_handed_on_one_step_later(make_point, kind, observe):
    planner = kind(make_point(), horizon=3)
    td = observe(planner, torch.randn(2, 2))
    torch.manual_seed(5)
    _, solution = planner.plan(td)
    torch.manual_seed(5)
    planner(td)
    mean = solution.memory["mean"]
    expected = torch.stack((mean[:, 1], mean[:, 2], mean[:, 2]), 1)
    assert torch.equal(td["next", "planner", "mean"], expected)


def test_seed_gradients_and_modes(make_predictor, kind, observe):
    predictor = make_predictor()
    predictor.model.eval()
    planner = kind(predictor, horizon=3, n_samples=20, use_value_func=True)
    modes = {name: m.training for name, m in predictor.named_modules()}
    td = observe(planner, torch.randn(2, 2))
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


def test_defaults_are_those_that_are_documented(make_point, kind):
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


def first(kind, predictor, obs, observe, **options):
    planner = kind(predictor, **{"horizon": 3, "n_samples": 200} | options)
    return planner(observe(planner, obs))["action"]


def ends_beyond(limit):
    return lambda after: (after > limit).float()


def treasure(state, context, action):
    """Worth 5 a step beyond 0.8; moving costs."""
    return 5.0 * (state > 0.8)[..., 0].float() - action[..., 0] ** 2


def test_term_prob_and_discount_count(make_point, kind, observe):
    mortal, obs = make_point(ends_beyond(0.8), rew_func=treasure), torch.zeros(2, 2)
    wide = {"initial_sigma": 1.0}  # two great moves are needed for it
    dead = first(kind, mortal, obs, observe, **wide)
    fearless = first(kind, mortal, obs, observe, use_term_prob=False, **wide)
    assert (dead.abs() < 0.15).all()  # the dead cannot take the treasure
    assert (fearless > 0.5).all()
    immortal = make_point(rew_func=treasure)
    assert (first(kind, immortal, obs, observe, **wide) > 0.5).all()
    assert (first(kind, immortal, obs, observe, discount=0.1, **wide).abs() < 0.15).all()


def test_the_value_function_stands_in_for_the_horizon(make_point, kind, observe):
    predictor = make_point(val_func=lambda s, c, a: -((s - c)[..., 0] ** 2))
    obs = torch.tensor([[0.0, 0.3], [0.5, 0.2]])
    action = first(kind, predictor, obs, observe, horizon=1, use_value_func=True)
    torch.testing.assert_close(action, torch.tensor([[0.6], [-0.6]]), atol=0.1, rtol=0)
    assert predictor.terminal_value is predictor.val_func


def test_an_exploration_bonus_is_added(make_point, kind, observe):
    predictor, obs = make_point(rew_func=lambda s, c, a: -(a[..., 0] ** 2)), torch.zeros(2, 2)

    def bonus(state, context, action):
        return 1.2 * action[..., 0]

    assert (first(kind, predictor, obs, observe).abs() < 0.15).all()
    explored = first(kind, predictor, obs, observe, exploration_bonus=bonus)
    torch.testing.assert_close(explored, torch.full((2, 1), 0.6), atol=0.15, rtol=0)


class Gamble(Model):
    """Two members: what the one gains from a positive action, the other loses, less a bit."""

    def __init__(self, **kwargs):
        kwargs = {"n_models": 2} | kwargs
        super().__init__(Unbounded((1,)), None, Bounded(-1.0, 1.0, (1,)), **kwargs)
        self.factor = torch.linspace(1.0, -0.7, self.n_models).view(-1, 1, 1)

    def predict_members(self, state, context, action):
        after = (state + self.factor * action.clamp_min(0.0)).unsqueeze(-2)
        weights = torch.ones_like(after[..., 0])
        return (after, torch.zeros_like(after)), weights, torch.zeros_like(weights[..., 0])


def test_risk_decides_whether_to_gamble(kind, observe):
    predictor = StaticPredictor(Gamble(), None, lambda s, c, a: s[..., 0], IdentityEncoder((1,)), 1)
    obs = torch.zeros(2, 1)
    options = {"horizon": 2, "return_mode": "mean", "n_iterations": 10}
    bold = first(kind, predictor, obs, observe, **options)
    assert (bold > 0.7).all()
    assert (first(kind, predictor, obs, observe, risk=Mean(), **options) > 0.7).all()
    for risk in (WorstCase(), CVaR(0.5)):
        assert (first(kind, predictor, obs, observe, risk=risk, **options) < 0.1).all()


def test_propagation_decides_what_the_members_disagree_on(kind, observe):
    """Members that are averaged at each step do not differ, so that there is no risk."""
    predictor = StaticPredictor(Gamble(), None, lambda s, c, a: s[..., 0], IdentityEncoder((1,)), 1)
    options = {"horizon": 2, "return_mode": "mean", "n_iterations": 10, "risk": WorstCase()}
    obs = torch.zeros(2, 1)
    for propagation in (None, TSInfinity()):
        action = first(kind, predictor, obs, observe, propagation=propagation, **options)
        assert (action < 0.1).all()
    assert (first(kind, predictor, obs, observe, propagation=Expectation(), **options) > 0.7).all()


def test_deterministic_plans_follow_the_means(make_predictor, observe):
    predictor = make_predictor()
    torch.nn.init.normal_(predictor.rew_func.net[-1].weight)
    costs = {}
    for deterministic in (False, True):
        planner = CEMPlanner(predictor, horizon=3, n_samples=20, deterministic=deterministic)
        td = observe(planner, torch.ones(1, 2))
        noise = planner.optimizer.draw_noise((1,))
        costs[deterministic] = [planner.plan(td, noise)[1].best_cost for _ in range(2)]
    assert torch.equal(*costs[True])
    assert not torch.equal(*costs[False])


def test_what_is_returned(make_point, observe):
    predictor, obs = make_point(), torch.randn(3, 2)
    for name in ("mean", "best", "random"):
        planner = CEMPlanner(predictor, horizon=3, n_samples=30, return_mode=name)
        actions, solution = planner.plan(observe(planner, obs))
        assert torch.equal(actions, getattr(solution, name))
    for function, name in ((mean_plan, "mean"), (best_plan, "best"), (lambda s: -s.best, None)):
        planner = CEMPlanner(predictor, horizon=3, n_samples=30, return_mode=function)
        actions, solution = planner.plan(observe(planner, obs))
        assert torch.equal(actions, getattr(solution, name) if name else -solution.best)


def test_the_callback_sees_the_plan_and_changes_nothing(make_predictor, kind, observe):
    predictor = make_predictor(model={"n_models": 3, "n_particles_per_model": 2})
    seen, results = [], []
    for callback in (None, seen.append):
        planner = kind(predictor, horizon=4, n_samples=20, callback=callback)
        td = observe(planner, torch.ones(2, 2))
        torch.manual_seed(0)
        results.append([planner(td)["action"].clone() for _ in range(2)])
    for with_, without in zip(*results, strict=True):
        assert torch.equal(with_, without)
    assert len(seen) == 2
    assert seen[0].batch_size == (2, 3, 2, 4)
    assert torch.equal(seen[0]["action"][:, 0, 0, 0], results[0][0])
    assert torch.equal(seen[0]["state"][:, 0, 0, 0], torch.ones(2, 2))
    assert ("next", "reward") in seen[0].keys(True)


@pytest.mark.parametrize("sigma", [0.01, 0.5])
def test_the_first_samples_have_the_given_sigma(make_point, kind, observe, sigma):
    planner = kind(make_point(), horizon=2, n_samples=400, n_iterations=1, initial_sigma=sigma)
    seen = []
    planner.predictor.rew_func = lambda s, c, a: seen.append(a) or s[..., 0]
    planner(observe(planner, torch.zeros(2, 2)))
    first_step = seen[0].flatten()
    assert first_step.std().item() == pytest.approx(sigma, rel=0.15)


def test_each_dimension_has_its_own_bounds(kind, observe):
    low, high = torch.tensor([-0.1, 2.0]), torch.tensor([0.3, 7.0])
    encoder = IdentityEncoder((2,))

    class Free(Model):
        def predict_members(self, state, context, action):
            after = (state + action).unsqueeze(-2)
            weights = torch.ones_like(after[..., 0])
            return (after, torch.zeros_like(after)), weights, torch.zeros_like(weights[..., 0])

    model = Free(Unbounded((2,)), None, Bounded(low, high, (2,)))
    predictor = StaticPredictor(model, None, lambda s, c, a: a.sum(-1), encoder, 2)
    obs = torch.zeros(2, 2)
    torch.testing.assert_close(
        first(kind, predictor, obs, observe), high.expand(2, 2), atol=0.1, rtol=0
    )
    narrow = Bounded(low, low + 0.05, (2,))
    action = first(kind, predictor, obs, observe, action_spec=narrow)
    assert narrow.is_in(action)
    torch.testing.assert_close(action, (low + 0.05).expand(2, 2), atol=0.02, rtol=0)


# -- bad input ------------------------------------------------------------------------------------


def test_a_missing_primer_is_named(make_point, kind, observe):
    planner = kind(make_point(), horizon=2)
    td = observe(planner, torch.randn(3, 2))
    with pytest.raises(KeyError, match="make_tensordict_primer"):
        planner(td.exclude("planner"))
    with pytest.raises(KeyError, match="observation"):
        planner(td.exclude("observation"))
    with pytest.raises(ValueError, match="'mean' has shape"):
        planner(observe(kind(make_point(), horizon=5), torch.randn(3, 2)))


class Broken(Gamble):
    """The second of three members predicts NaN for some actions."""

    def predict_members(self, state, context, action):
        out = super().predict_members(state, context, action)
        out[0][0][1] = torch.where(action[1, :, None] > 0.5, torch.nan, out[0][0][1])
        return out


def test_nan_from_a_member_is_an_error_that_names_it(kind, observe):
    for reward in (lambda s, c, a: s[..., 0], lambda s, c, a: s.nan_to_num()[..., 0]):
        predictor = StaticPredictor(Broken(n_models=3), None, reward, IdentityEncoder((1,)), 1)
        with pytest.raises(ValueError, match=r"member(\(s\))? \[?1"):
            first(kind, predictor, torch.zeros(2, 1), observe)


def test_a_reward_that_is_nan_is_an_error(make_point, kind, observe):
    predictor = make_point(rew_func=lambda s, c, a: torch.where(a > 0.5, torch.nan, a)[..., 0])
    with pytest.raises(ValueError, match=r"not finite|NaN|non-finite"):
        first(kind, predictor, torch.zeros(2, 2), observe)


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
def test_what_does_not_fit_is_refused(make_point, kind, parts, options, error, match):
    with pytest.raises(error, match=match):
        kind(make_point(**parts), **options)


def test_an_optimizer_for_other_actions_is_refused(make_point):
    search = GaussianSearch(-torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="make_search"):
        PredictorPlanner(make_point(), CEM(search, 3))
    with pytest.raises(TypeError, match="Optimizer"):
        PredictorPlanner(make_point(), "cem")
