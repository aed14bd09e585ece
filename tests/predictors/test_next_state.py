"""Rewards and terminations of where a step leads, against loops over particles and components."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import make_ensemble, make_point
from tensordict import TensorDict
from torchrl.data import Categorical, OneHot
from torchrl.envs import ExplorationType, set_exploration_type
from torchrl.modules import CEMPlanner as TorchRLCEM

from layeredrl_torchrl import (
    TS1,
    CEMPlanner,
    Expectation,
    FixedEncoderNet,
    IdentityEncoder,
    PredictorEnv,
    StaticPredictor,
    TSInfinity,
    reads_next_state,
)

PROPAGATIONS = [TSInfinity(), TS1(), Expectation()]
KINDS = ["TSInfinity", "TS1", "Expectation"]


@reads_next_state
def progress(state, context, action, next_state):
    return 3.0 * (next_state - state)[..., 0] - action.square().sum(-1) + context[..., 0]


@reads_next_state
def fallen(state, context, action, next_state):
    return next_state[..., 1] > 0.2


@reads_next_state
def risky(state, context, action, next_state):
    return torch.sigmoid(next_state[..., 0] - state[..., 1])


def tired(state, context, action):
    """A probability that does not need the next state."""
    return torch.sigmoid(state[..., 0])


def by_hand(name, state, context, action, next_state):
    """The functions above for one step, in plain floats."""
    state, context, action, next_state = (x.tolist() for x in (state, context, action, next_state))
    if name == "progress":
        return 3.0 * (next_state[0] - state[0]) - sum(a * a for a in action) + context[0]
    if name == "fallen":
        return float(next_state[1] > 0.2)
    z = next_state[0] - state[1] if name == "risky" else state[0]
    return 1.0 / (1.0 + math.exp(-z))


def build(term_func=fallen, rew_func=progress, val_func=None):
    """A predictor with known functions on an untrained ensemble of 3 members and 2 modes."""
    model = make_ensemble(2, 1, n_models=3, n_modes=2, n_particles_per_model=2)
    parts = model, val_func, rew_func, FixedEncoderNet((3,), [0, 1], [2])
    return StaticPredictor(*parts, 2, 1, term_func=term_func).requires_grad_(False)


def value(state, context, action):
    return state[..., 0] * 2.0 - context[..., 0]


# -- rollouts and returns -----------------------------------------------------------------------


@pytest.mark.parametrize("term_func", [fallen, risky, tired])
@pytest.mark.parametrize("propagation", PROPAGATIONS, ids=KINDS)
def test_a_rollout_asks_about_each_particles_own_next_state(propagation, term_func):
    predictor = build(term_func)
    obs, actions = torch.randn(2, 3), 2 * torch.rand(2, 4, 1) - 1
    traj = predictor.rollout(obs, actions, propagation=propagation)
    for index in itertools.product(*map(range, traj.batch_size)):
        one = traj[index]
        step = [one[key] for key in ("state", "context", "action", ("next", "state"))]
        assert one["next", "reward"].item() == pytest.approx(by_hand("progress", *step), abs=1e-5)
        expected = by_hand(term_func.__name__, *step)
        assert one["next", "term_prob"].item() == pytest.approx(expected, abs=1e-5)
    # Particles part, and so do their rewards.
    if not isinstance(propagation, Expectation):
        assert traj["next", "reward"][0, ..., -1, 0].std() > 0.01


def test_a_rollout_writes_the_known_termination_under_the_models_key():
    keys = [("next", key) for key in ("loc", "weights", "scale", "ends", "state")]
    model = make_ensemble(2, 1, n_models=3, out_keys=keys)
    encoder = FixedEncoderNet((3,), [0, 1], [2])
    predictor = StaticPredictor(model, None, progress, encoder, 2, 1, term_func=fallen)
    traj = predictor.rollout(torch.randn(5, 3), 2 * torch.rand(5, 4, 1) - 1)
    assert ("next", "term_prob") not in traj.keys(True)
    expected = (traj["next", "state"][..., 1:] > 0.2).float()
    assert torch.equal(traj["next", "ends"], expected)


@pytest.mark.parametrize("rows", [1, 2048])
@pytest.mark.parametrize(
    "options",
    [{}, {"discount": 0.9, "use_value_func": True}, {"discount": 0.9, "use_term_prob": False}],
    ids=str,
)
@pytest.mark.parametrize("term_func", [fallen, risky, tired, None])
@pytest.mark.parametrize("propagation", PROPAGATIONS, ids=KINDS)
def test_returns_are_those_of_the_rollout(propagation, term_func, options, rows, monkeypatch):
    monkeypatch.setattr("layeredrl_torchrl.predictors.returns._ROWS", rows)
    predictor = build(term_func, val_func=value)
    obs, actions = torch.randn(2, 3), 2 * torch.rand(2, 5, 1) - 1
    torch.manual_seed(1)
    found = predictor.returns(*predictor.encode(obs), actions, propagation=propagation, **options)
    torch.manual_seed(1)
    traj = predictor.rollout(obs, actions, propagation=propagation)
    assert found.shape == traj.batch_size[:-1]
    for index in itertools.product(*map(range, found.shape)):
        total, share = 0.0, 1.0
        for step in traj[index].unbind(0):
            made = [step[key] for key in ("state", "context", "action", ("next", "state"))]
            total += share * by_hand("progress", *made)
            share *= options.get("discount", 1.0)
            if options.get("use_term_prob", True):
                ends = step["next", "term_prob"].item()
                share *= 1.0 - (ends if term_func is None else by_hand(term_func.__name__, *made))
        if options.get("use_value_func"):
            total += share * (2.0 * made[3][0].item() - made[1].item())
        assert found[index].item() == pytest.approx(total, rel=1e-4, abs=1e-4)


def test_what_comes_after_the_end_is_worth_nothing():
    """At full speed the point passes 1.2 in its third step, the last that is paid."""
    paid = reads_next_state(lambda s, c, a, after: 1.0 + 0.0 * after[..., 0])
    over = reads_next_state(lambda s, c, a, after: after[..., 0] > 1.2)
    base = make_point(val_func=lambda s, c, a: torch.full_like(s[..., 0], 100.0))
    predictor = StaticPredictor(base.model, base.val_func, paid, base.encoder, 1, 1, term_func=over)
    start, actions = (torch.zeros(1), torch.zeros(1)), torch.ones(6, 1)
    assert predictor.returns(*start, actions, use_value_func=True).item() == 3.0
    assert predictor.returns(*start, 0.1 * actions, use_value_func=True).item() == 106.0
    assert predictor.returns(*start, actions, use_term_prob=False).item() == 6.0


def test_gradients_reach_the_actions():
    """Of ``-(x + a / 2 - goal)^2``: ``-(x + a / 2 - goal)``."""
    cost = reads_next_state(lambda s, c, a, after: -(after - c).square().sum(-1))
    predictor = make_point(rew_func=cost)
    state, goal = torch.tensor([[0.3]]), torch.tensor([[1.0]])
    action = torch.tensor([[[0.4]]], requires_grad=True)
    predictor.returns(state, goal, action).sum().backward()
    torch.testing.assert_close(action.grad.squeeze(), torch.tensor(-(0.3 + 0.2 - 1.0)))


def test_the_dynamics_run_once(monkeypatch):
    calls = []
    base = make_point()
    asked = type(base.model).predict_members

    def counted(self, *inputs):
        calls.append(inputs)
        return asked(self, *inputs)

    monkeypatch.setattr(type(base.model), "predict_members", counted)
    both = [reads_next_state(lambda s, c, a, after: 0.1 * after[..., 0].abs()) for _ in range(2)]
    predictor = StaticPredictor(base.model, None, both[0], base.encoder, 1, 1, term_func=both[1])
    obs, act = torch.rand(3, 2), torch.rand(3, 4, 1)
    td = predictor.encode(TensorDict({"observation": obs, "action": act[:, 0]}, [3]))
    for call, expected in (
        (lambda: predictor.predict(obs, act[:, 0]), 1),
        (lambda: predictor.predict_reward(obs, act[:, 0]), 1),
        (lambda: predictor.step(td.clone()), 1),
        (lambda: PredictorEnv(predictor).step(td.clone()), 1),
        (lambda: predictor.rollout(obs, act), 4),
        (lambda: predictor.returns(*predictor.encode(obs), act), 4),
    ):
        calls.clear()
        call()
        assert len(calls) == expected


# -- single steps -------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
@pytest.mark.parametrize("term_func", [fallen, risky, tired])
def test_single_steps_average_over_the_mixture(batch, term_func):
    predictor = build(term_func)
    obs, act = torch.randn(*batch, 3), 2 * torch.rand(*batch, 1) - 1
    mean, weights, _, reward, term_prob = predictor.predict(obs, act)
    assert reward.shape == term_prob.shape == batch
    for index in itertools.product(*map(range, batch)):
        expected = dict.fromkeys(("progress", term_func.__name__), 0.0)
        for m, k in itertools.product(range(3), range(2)):
            step = obs[index][:2], obs[index][2:], act[index], mean[index][m, k]
            for name in expected:
                expected[name] += weights[index][m, k].item() / 3 * by_hand(name, *step)
        assert reward[index].item() == pytest.approx(expected["progress"], abs=1e-5)
        assert term_prob[index].item() == pytest.approx(expected[term_func.__name__], abs=1e-5)
    torch.testing.assert_close(predictor.predict_reward(obs, act), reward)
    td = predictor(TensorDict({"observation": obs, "action": act}, batch))
    torch.testing.assert_close(td["next", "reward"].squeeze(-1), reward)
    torch.testing.assert_close(td["next", "term_prob"].squeeze(-1), term_prob)
    assert torch.equal(td["next", "terminated"].squeeze(-1), term_prob > 0.5)


def test_predictions_can_be_vmapped():
    predictor = build(risky)
    obs, act = torch.randn(4, 3), 2 * torch.rand(4, 1) - 1
    torch.testing.assert_close(torch.vmap(predictor.predict)(obs, act), predictor.predict(obs, act))


@pytest.mark.parametrize("space", ["one-hot", "integer"])
def test_choices_are_handed_on_in_the_form_of_the_spec(space):
    seen = []

    @reads_next_state
    def reward(state, context, action, next_state):
        seen.append(action.shape)
        return next_state[..., 0]

    model = make_ensemble(2, 0, OneHot(3) if space == "one-hot" else Categorical(3))
    predictor = StaticPredictor(model, None, reward, IdentityEncoder((2,)), 2)
    mean, *_, found, _ = predictor.predict(torch.zeros(5, 2), torch.arange(5) % 3)
    torch.testing.assert_close(found, mean[..., 0].mean((1, 2)))
    assert seen == [(5, 2, 1, 3) if space == "one-hot" else (5, 2, 1)]


# -- the imagined environment, planners ---------------------------------------------------------


@pytest.mark.parametrize("term_func", [fallen, risky])
@pytest.mark.parametrize("propagation", PROPAGATIONS, ids=KINDS)
def test_the_environment_asks_about_the_state_that_it_steps_to(propagation, term_func):
    predictor = build(term_func, val_func=value)
    envs = [
        PredictorEnv(predictor, propagation=propagation),
        PredictorEnv(predictor, propagation=propagation, use_value_func=True, discount=0.9),
    ]
    td = predictor.encode(TensorDict({"observation": torch.randn(20, 3)}, [20]))
    td["action"] = 2 * torch.rand(20, 1) - 1
    for env, shaped in zip(envs, (False, True), strict=True):
        torch.manual_seed(4)
        after = env.step(td.clone())["next"]
        for i in range(20):
            step = td["state"][i], td["context"][i], td["action"][i], after["state"][i]
            reward, ends = by_hand("progress", *step), by_hand(term_func.__name__, *step)
            if shaped:
                values = [2.0 * s[0].item() - step[1].item() for s in (step[0], step[3])]
                reward += 0.9 * (1.0 - ends) * values[1] - values[0]
                left = after["imagined_discount"][i].item()
                assert left == pytest.approx(0.9 * (1.0 - ends), abs=1e-5)
            assert after["reward"][i].item() == pytest.approx(reward, abs=1e-4)
            assert after["terminated"][i].item() == (ends > 0.5)


def test_episodes_end_as_often_as_the_function_says():
    predictor = build(lambda s, c, a: torch.full_like(s[..., 0], 0.3))
    env = PredictorEnv(predictor, propagation=TS1(), sample_termination=True)
    td = predictor.encode(TensorDict({"observation": torch.randn(4000, 3)}, [4000]))
    ended = env.step(td.set("action", torch.zeros(4000, 1)))["next", "done"]
    assert ended.float().mean().item() == pytest.approx(0.3, abs=0.03)


def their_cem(predictor):
    options = {"planning_horizon": 1, "optim_steps": 12, "num_candidates": 100, "top_k": 10}
    planner = TorchRLCEM(PredictorEnv(predictor), **options)
    return lambda td: planner(predictor.encode(td))["action"]


def our_cem(predictor):
    planner = CEMPlanner(predictor, horizon=1, n_samples=100, n_iterations=12)
    return lambda td: planner(td.update(planner.forget(td.batch_size)))["action"]


@pytest.mark.parametrize("make", [our_cem, their_cem])
@torch.no_grad()
def test_a_plan_of_one_step_finds_the_best_next_state(make):
    """Of ``-(x + a / 2 - goal)^2 - a^2``: ``a = (goal - x) / 2.5``, within [-1, 1]."""
    cost = reads_next_state(lambda s, c, a, after: -((after - c) ** 2 + a**2)[..., 0])
    obs = torch.tensor([[0.0, 1.0], [0.5, -0.5], [0.0, 9.0]])
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        action = make(make_point(rew_func=cost))(TensorDict({"observation": obs}, [3]))
    torch.testing.assert_close(action, torch.tensor([[0.4], [-0.4], [1.0]]), atol=0.02, rtol=0)
