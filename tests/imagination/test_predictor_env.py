"""The imagined environment against loops over the model, and TorchRL's planners on top of it."""

from __future__ import annotations

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, Categorical, OneHot, Unbounded
from torchrl.envs import (
    CatTensors,
    ExcludeTransform,
    RenameTransform,
    RewardSum,
    StepCounter,
    TransformedEnv,
)
from torchrl.envs.model_based import ModelBasedEnvBase
from torchrl.envs.utils import check_env_specs
from torchrl.modules import CEMPlanner, MPPIPlanner
from torchrl.objectives.value import TDLambdaEstimator

from layeredrl_torchrl import (
    TS1,
    FixedEncoderNet,
    IdentityEncoder,
    PredictorEnv,
    Propagation,
    TSInfinity,
)

BATCHES = [(), (3,), (2, 3)]


@pytest.fixture
def build(make_predictor):
    """An untrained predictor of 3 members and 2 modes with random heads, and a context."""

    def build(**kwargs):
        encoder = FixedEncoderNet((3,), [0, 1], [2])
        model = {"n_models": 3, "n_modes": 2} | kwargs.pop("model", {})
        predictor = make_predictor(encoder, context_dim=1, model=model, **kwargs)
        for head in (predictor.rew_func, predictor.val_func, predictor.target_val_func):
            nn.init.normal_(head.net[-1].weight)
        return predictor.requires_grad_(False)

    return build


def imagine(env, start, actions):
    """All steps of a plan ``[*B, H, *]``, as TorchRL's planners run it: past any done."""
    steps = iter(actions.unbind(start.ndim))
    return env.rollout(
        actions.shape[start.ndim],
        lambda td: td.set("action", next(steps)),
        auto_reset=False,
        tensordict=start.clone(),
        break_when_any_done=False,
    )


@pytest.mark.parametrize("use_value_func", [False, True])
def test_specs_are_what_torchrl_expects(build, make_point, make_predictor, use_value_func):
    renamed = make_predictor(
        IdentityEncoder((2,), out_keys=["latent", "goal"]),
        model={
            "in_keys": ["latent", "goal", "action"],
            "out_keys": [("next", k) for k in ("loc", "weights", "scale", "p", "latent")],
        },
    )
    value = make_point(val_func=lambda state, context, action: state.sum(-1))
    for predictor in (build(), value, make_predictor(), renamed):
        env = PredictorEnv(predictor, use_value_func=use_value_func)
        assert isinstance(env, ModelBasedEnvBase)
        assert env.predictor is predictor
        check_env_specs(env)
        assert env.rollout(3, break_when_any_done=False).batch_size == (3,)


def start_at(predictor, batch, obs_dim=3):
    obs = torch.randn(*batch, obs_dim)
    return predictor.encode(TensorDict({"observation": obs}, batch)).exclude("observation")


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("space", [Bounded(-1.0, 1.0, (1,)), OneHot(3), Categorical(3)])
def test_a_rollout_equals_a_loop_over_the_models_means(build, batch, space):
    predictor = build(model={"action_space": space})
    start, actions = start_at(predictor, batch), space.rand((*batch, 5))

    data = imagine(PredictorEnv(predictor), start, actions)

    assert data.batch_size == (*batch, 5)
    state, context = start["state"], start["context"]
    for h in range(5):
        step, action = data[..., h], actions.select(len(batch), h)
        mean, weights, _, term_prob = predictor.model.predict(state, context, action)
        following = torch.zeros_like(state)
        for m in range(3):
            for k in range(2):
                following += weights[..., m, k, None] * mean[..., m, k, :] / 3
        reward = predictor.rew_func(state, context, action)
        torch.testing.assert_close(step["state"], state)
        torch.testing.assert_close(step["next", "state"], following)
        torch.testing.assert_close(step["next", "reward"], reward.unsqueeze(-1))
        assert torch.equal(step["next", "context"], context)
        assert torch.equal(step["next", "terminated"], (term_prob > 0.5).unsqueeze(-1))
        assert torch.equal(step["next", "done"], step["next", "terminated"])
        state = following


def ends_beyond(limit):
    return lambda after: (after > limit).float()


@pytest.mark.parametrize("batch", [(), (2,), (2, 2)])
def test_nothing_is_reset_within_a_plan(make_point, batch):
    """After a predicted end the state goes on, and the context is the same throughout."""
    predictor = make_point(ends_beyond(0.6))
    start = TensorDict(
        {
            "state": torch.zeros(*batch, 1),
            "context": torch.randn(*batch, 1),
            "done": torch.ones(*batch, 1, dtype=torch.bool),  # what a real environment may hold
            "terminated": torch.ones(*batch, 1, dtype=torch.bool),
        },
        batch,
    )
    actions = torch.ones(*batch, 6, 1)
    if batch:
        actions[0] = 0.1  # this one does not end
    data = imagine(PredictorEnv(predictor), start, actions)
    states = start["state"].unsqueeze(-2) + 0.5 * actions.cumsum(-2)
    torch.testing.assert_close(data["next", "state"], states)
    assert torch.equal(data["next", "done"], states > 0.6)
    contexts = start["context"].unsqueeze(-2).expand(*batch, 6, 1)
    assert torch.equal(data["next", "context"], contexts)
    assert torch.equal(data["context"], contexts)


@pytest.mark.parametrize("transform", [RewardSum, lambda: StepCounter(max_steps=2)])
def test_what_starts_over_at_zeros_under_a_transform_is_warned_of(make_point, transform):
    start = TensorDict({"state": torch.zeros(3, 1), "context": torch.ones(3, 1)}, [3])
    act = lambda td: td.set("action", torch.ones(3, 1))  # noqa: E731
    options = {"policy": act, "tensordict": start, "break_when_any_done": False}
    plain = PredictorEnv(make_point(ends_beyond(0.6)), batch_size=[3])
    starts = lambda n: start[:1].expand(n).clone()  # noqa: E731
    given = PredictorEnv(plain.predictor, batch_size=[3], initial_states=starts)
    for env in (plain, TransformedEnv(given, transform())):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert (env.rollout(6, **options)["context"] == 1).all()
    with pytest.warns(UserWarning, match=r"starts over in a state and context of zeros"):
        data = TransformedEnv(plain, transform()).rollout(6, **options)
    assert not data["context"].all()


def test_a_reset_begins_with_the_member_that_it_is_given(build):
    env = PredictorEnv(build(), propagation=TSInfinity(), batch_size=[30])
    start = env.reset()
    start["imagined_member"][:] = 2
    assert (
        env.reset(start.select("state", "context", "imagined_member"))["imagined_member"] == 2
    ).all()
    assert len(env.reset(start.select("state", "context"))["imagined_member"].unique()) == 3


# -- the value beyond the horizon -------------------------------------------------------------


def potential(state, context, action):
    return torch.sin(3 * state[..., 0]) + 2 * context[..., 0]


@pytest.mark.parametrize("discount", [0.9, 1.0])
@pytest.mark.parametrize("batch", BATCHES)
def test_shaped_rewards_sum_to_the_return_and_the_terminal_value(make_point, batch, discount):
    """sum of shaped rewards + V(s0) = discounted return of one that may die + c_H V(s_H)."""
    predictor = make_point(lambda after: 0.4 * after.sigmoid(), potential, n_models=2)
    env = PredictorEnv(predictor, use_value_func=True, discount=discount)
    start, actions = start_at(predictor, batch, 2), 2 * torch.rand(*batch, 7, 1) - 1

    data = imagine(env, start, actions)

    total = data["next", "reward"].sum((-2, -1)) + potential(start["state"], start["context"], None)
    for index in np.ndindex(*batch):
        x, goal = float(start["state"][index]), float(start["context"][index])
        alive, expected = 1.0, 0.0
        for h in range(7):
            expected += alive * -((x - goal) ** 2)
            x += 0.5 * float(actions[index][h])
            alive *= discount * (1 - 0.4 / (1 + np.exp(-x)))
        expected += alive * (np.sin(3 * x) + 2 * goal)
        assert total[index].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
        left = data[index][-1]["next", "imagined_discount"]
        assert left.item() == pytest.approx(alive, rel=1e-4)


def test_the_value_is_the_predictors_terminal_value_discounted_by_0_99_by_default(build):
    predictor = build()
    assert predictor.terminal_value is predictor.target_val_func
    env = PredictorEnv(predictor, use_value_func=True)
    td = start_at(predictor, (4,)).set("action", torch.zeros(4, 1))
    following = env.step(td.clone())["next"]
    plain = PredictorEnv(predictor).step(td.clone())["next"]
    _, _, _, term_prob = predictor.model.predict(td["state"], td["context"], td["action"])
    v = predictor.terminal_value
    expected = plain["reward"].squeeze(-1) - v(td["state"], td["context"], td["action"])
    after = v(plain["state"], td["context"], td["action"])
    expected += 0.99 * (1 - term_prob) * after
    torch.testing.assert_close(following["reward"].squeeze(-1), expected)


# -- TorchRL's planners -----------------------------------------------------------------------


SMALL = {"planning_horizon": 4, "optim_steps": 10, "num_candidates": 100, "top_k": 10}


def make_cem(env):
    return CEMPlanner(env, **SMALL)


def make_mppi(env):
    zero = TensorDictModule(torch.zeros_like, in_keys=["state"], out_keys=["state_value"])
    advantage = TDLambdaEstimator(gamma=1.0, lmbda=1.0, value_network=zero)
    return MPPIPlanner(env, advantage, temperature=1.0, **SMALL)


PLANNERS = [make_cem, make_mppi]


def plan(planner, obs, predictor):
    td = predictor.encode(TensorDict({"observation": obs}, obs.shape[:-1]))
    with torch.no_grad():
        return planner(td)["action"]


@pytest.mark.parametrize("make", PLANNERS)
@pytest.mark.parametrize("batch", BATCHES)
def test_planners_find_the_known_optimum(make_point, make, batch, propagation, unchanged):
    """The cost falls on where the point is, so the best first move goes as near as it can.

    Its moves are limited by the space of actions that the environment is given, too.
    """
    predictor = make_point(n_models=2)
    space = gym.spaces.Box(-0.9, 1.0, (1,), dtype=np.float64)
    planner = make(PredictorEnv(predictor, propagation=propagation, action_spec=space))
    obs = torch.tensor([[0.0, 0.2], [0.3, 0.1], [0.0, 5.0], [0.0, -5.0], [1.0, 1.0], [-2.0, -2.4]])
    obs = obs[: torch.Size(batch).numel()].reshape(*batch, 2)
    before = obs.clone()

    with unchanged(predictor):
        action = plan(planner, obs, predictor)

    best = (2 * (obs[..., 1:] - obs[..., :1])).clamp(-0.9, 1)
    assert action.shape == (*batch, 1)
    torch.testing.assert_close(action, best, atol=0.1, rtol=0)
    assert planner.env.action_spec.is_in(action)
    assert torch.equal(obs, before)


@pytest.mark.parametrize("make", PLANNERS)
def test_rewards_after_a_predicted_end_do_not_count(make_point, make):
    """Beyond 0.8 lies a treasure that the dead cannot take: then standing still is best."""

    def treasure(state, context, action):
        return 5.0 * (state > 0.8)[..., 0].float() - action[..., 0] ** 2

    obs = torch.zeros(2, 2)
    reached, dead = (
        plan(make(PredictorEnv(make_point(term, rew_func=treasure))), obs, make_point())
        for term in (None, ends_beyond(0.8))
    )
    assert (reached > 0.5).all()  # two moves that sum to more than 1.6
    assert (dead.abs() < 0.15).all()


# -- construction -----------------------------------------------------------------------------


def test_the_state_holds_every_part_of_the_predictor_once(build):
    env = PredictorEnv(build(), use_value_func=True)
    places = [v.data_ptr() for v in env.state_dict().values() if v.numel()]
    assert len(places) == len(set(places))


class Other(Propagation):
    def advance(self, step, n_models, state, context, action):
        raise NotImplementedError


class Turned(TSInfinity):
    """Whose own way of moving particles would not be gone."""


def actions(space):
    return {"model": {"action_space": space}}


DISCRETE = actions(OneHot(2))


@pytest.mark.parametrize(
    ("parts", "options", "error", "match"),
    [
        ({"rew_func": None}, {}, ValueError, "rew_func"),
        ({"val_func": None}, {"use_value_func": True}, ValueError, "val_func"),
        ({}, {"discount": 0.9}, ValueError, "use_value_func"),
        ({}, {"action_spec": Bounded(-1, 1, (2,))}, ValueError, "action_spec"),
        ({}, {"action_spec": Bounded(-1, 1, (3, 1))}, ValueError, "action_spec"),
        ({}, {"action_spec": OneHot(2)}, ValueError, "action_spec"),
        (DISCRETE, {"action_spec": Unbounded((2,))}, ValueError, "action_spec"),
        (DISCRETE, {"action_spec": OneHot(3)}, ValueError, "action_spec"),
        (actions(Categorical(3)), {"action_spec": Categorical(2)}, ValueError, "action_spec"),
        (actions(OneHot(1)), {"action_spec": Categorical(1, (1,))}, ValueError, "action_spec"),
        ({}, {"propagation": "ts1"}, TypeError, "TSInfinity"),
        ({}, {"propagation": Other()}, TypeError, "TSInfinity"),
        ({}, {"propagation": Turned()}, TypeError, "TSInfinity"),
        ({}, {"propagation": TSInfinity(n_particles=4)}, ValueError, "n_particles=4.*one particle"),
        ({}, {"propagation": TS1(n_particles=1)}, ValueError, "n_particles=1.*one particle"),
        ({}, {"exploration_bonus": 1.0}, TypeError, "exploration_bonus"),
        ({}, {"initial_states": torch.zeros(3)}, TypeError, "initial_states"),
        ({}, {"use_value_func": True, "sample_termination": True}, ValueError, "twice"),
    ],
)
def test_what_does_not_fit_is_refused(make_predictor, parts, options, error, match):
    with pytest.raises(error, match=match):
        PredictorEnv(make_predictor(**parts), **options)


@pytest.mark.parametrize("space", [Bounded(-1.0, 1.0, (2,)), OneHot(3), Categorical(3)])
def test_its_own_action_spec_may_be_given(make_predictor, space):
    env = PredictorEnv(make_predictor(**actions(space)), action_spec=space)
    assert env.action_spec == space


def test_its_specs_cannot_be_taken_from_another_environment(make_point):
    with pytest.raises(RuntimeError, match=r"state space.*action_spec="):
        PredictorEnv(make_point()).set_specs_from_env(PredictorEnv(make_point()))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rew_func": lambda s, c, a: s[..., 0] / 0.0}, "what rew_func gave holds 3 non-finite"),
        ({"exploration_bonus": lambda state, context, action: state}, r"\[\*B\]"),
    ],
)
def test_what_the_users_functions_say_is_checked(make_point, options, match):
    parts = {key: options[key] for key in options if key == "rew_func"}
    env = PredictorEnv(make_point(**parts), **{k: v for k, v in options.items() if k not in parts})
    td = TensorDict(state=torch.zeros(3, 1), context=torch.zeros(3, 1), action=torch.zeros(3, 1))
    with pytest.raises(ValueError, match=match):
        env.step(td.auto_batch_size_(1))


@pytest.mark.parametrize(
    ("transform", "missing"),
    [
        (CatTensors(["state", "context"], "obs"), "state"),
        (RenameTransform(["state"], ["observation"]), "state"),
        (ExcludeTransform("context"), "context"),
    ],
)
def test_a_key_that_a_transform_takes_away_is_named(make_point, transform, missing):
    env = TransformedEnv(PredictorEnv(make_point(), batch_size=[2]), transform)
    with pytest.raises(KeyError, match=f"PredictorEnv reads '{missing}', which is missing"):
        env.rollout(2)
