"""Functions of the next state: how they are declared, copied, and checked."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from functools import partial

import pytest
import torch
from helpers import make_buffer, make_ensemble, make_point, make_predictor, make_transitions
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase, dispatch
from torch import nn
from torchrl.data import Bounded, Unbounded
from torchrl.envs.utils import check_env_specs

from layeredrl_torchrl import (
    CEMPlanner,
    EncoderNet,
    FixedEncoderNet,
    ICEMPlanner,
    PredictorEnv,
    PredictorFactory,
    RewardNet,
    StaticPredictor,
    get_task,
    reads_next_state,
)
from layeredrl_torchrl.nets import check_step_function
from layeredrl_torchrl.objectives import ConsistencyLoss
from layeredrl_torchrl.predictors import value_operator
from layeredrl_torchrl.predictors._functions import StepFunctions


def test_tasks_go_through_the_factory_and_through_pickle():
    task = get_task("Hopper-v5/x")
    env = task.make(seed=0)
    options = {"rew_func": task.rew_func(), "term_func": task.term_func()}
    factory = PredictorFactory(hidden_sizes=(8,), n_models=2, **options)
    predictor = factory(env.observation_spec, env.action_spec)
    obs = env.rollout(3)["observation"]
    found = []
    for one in (predictor, pickle.loads(pickle.dumps(predictor)), copy.deepcopy(predictor)):
        torch.manual_seed(0)
        found.append(one.rollout(obs, torch.zeros(len(obs), 5, 3)))
    assert (found[0] == found[1]).all()
    assert (found[0] == found[2]).all()


def test_a_declaration_is_an_attribute():
    def plain(state, context, action, next_state):
        return next_state[..., 0]

    assert reads_next_state(plain) is plain
    assert plain.reads_next_state
    assert reads_next_state(partial(plain)).reads_next_state

    @reads_next_state
    class Reward:
        def __call__(self, state, context, action, next_state):
            return next_state[..., 0]

    assert Reward().reads_next_state


def test_a_partial_passes_a_declaration_on():
    @reads_next_state
    def moved(state, context, action, next_state=None, scale=1.0):
        return scale * (next_state - state)[..., 0]

    predictor = make_point(rew_func=partial(partial(moved, scale=3.0)))
    obs, action = torch.randn(4, 2), torch.rand(4, 1)
    mean = predictor.predict(obs, action)[0][:, 0, 0]
    state = predictor.encode(obs)[0]
    torch.testing.assert_close(predictor.predict_reward(obs, action), 3.0 * (mean - state)[:, 0])


class Member(nn.Module):
    """A network of one's own, which takes what it is given as it is."""

    def __init__(self, *spaces):
        super().__init__()
        self.layer = nn.Linear(3, 5)

    def forward(self, state, context, action):
        mean, raw, term = self.layer(torch.cat([state, action], -1)).split([2, 2, 1], -1)
        ones = torch.ones_like(term)
        return (mean.unsqueeze(-2), raw.exp().unsqueeze(-2)), ones, term[..., 0].sigmoid()


class Paid(nn.Module):
    """A reward of one's own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, state, context, action):
        return self.layer(torch.cat([state, action], -1)).squeeze(-1)


def test_modules_of_ones_own_are_given_actions_in_the_precision_of_the_states():
    space = Bounded(-1.0, 1.0, (1,), dtype=torch.float64)
    encoder = EncoderNet((2,), 2, 0)
    parts = {"model": {"action_space": space, "partial_net": Member}, "rew_func": Paid()}
    predictor = make_predictor(encoder, **parts)
    loss = ConsistencyLoss(encoder, predictor.model)
    predictor.add_loss(loss, {"loss_consistency": 1.0})
    data = make_transitions()
    data["action"] = data["action"].double()
    assert predictor.learn(make_buffer(data), 2, 8, 8, 60)[0].isfinite()
    obs, action = data["observation"], data["action"]
    state, context = encoder(obs)
    expected = predictor.rew_func(state, context, action.float())
    torch.testing.assert_close(predictor.predict_reward(obs, action), expected)
    td = predictor(data.select("observation", "action"))
    torch.testing.assert_close(td["next", "reward"].squeeze(-1), expected)
    env = PredictorEnv(predictor)
    td = TensorDict({"state": state, "context": context, "action": action}, [60])
    torch.testing.assert_close(env.step(td)["next", "reward"].squeeze(-1), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64])
def test_rewards_are_floats_of_the_states_kind(dtype):
    def reached(state, context, action):
        return (state[..., 0] > 0.0).to(dtype)

    predictor = make_point(rew_func=reached)
    check_env_specs(PredictorEnv(predictor, batch_size=[3]))
    obs, actions = torch.randn(4, 2), torch.rand(4, 5, 1)
    rolled = predictor.rollout(obs, actions)["next", "reward"]
    for reward in (rolled, predictor.predict_reward(obs, actions[:, 0])):
        assert reward.dtype == torch.float32
    torch.testing.assert_close(
        predictor.returns(*predictor.encode(obs), actions).to(rolled.dtype), rolled.sum((-2, -1))
    )


def test_values_may_be_flags_in_an_imagined_environment():
    def safe(state, context, action=None):
        return state[..., 0].abs() < 1.0

    env = PredictorEnv(make_point(val_func=safe), batch_size=[3], use_value_func=True)
    check_env_specs(env)


class Slotted:
    __slots__ = ()

    def __call__(self, *inputs):
        return inputs[-1][..., 0]

    def method(self, *inputs):
        return inputs[-1][..., 0]


def test_next_states_are_kept_only_for_what_reads_them():
    plain = nn.Identity()
    ahead = reads_next_state(lambda state, context, action, after: after[..., 0])
    for reward, term in itertools.product((plain, ahead), (None, plain, ahead)):
        expected = ahead in (reward, term)
        assert StepFunctions(reward, None, term).look_ahead == expected


@pytest.mark.parametrize(
    "func", [len, Slotted(), Slotted().method], ids=["builtin", "slots", "method"]
)
def test_what_takes_no_attributes_is_refused(func):
    with pytest.raises(TypeError, match=r"takes no attributes; write `reads_next_state = True`"):
        reads_next_state(func)


def test_what_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="func must be callable, got 3"):
        reads_next_state(3)
    base = make_point()
    with pytest.raises(TypeError, match=r"term_func must be callable or None, got 0.5"):
        StaticPredictor(base.model, None, None, base.encoder, 1, 1, term_func=0.5)
    with pytest.raises(TypeError, match="term_func must be callable or None, got 'never'"):
        PredictorFactory(term_func="never")


def test_only_rewards_and_terminations_can_read_the_next_state():
    of_next = reads_next_state(lambda s, c, a, after: after[..., 0])
    match = "was declared to read the next state, but is called with state, context and action"
    with pytest.raises(ValueError, match=f"val_func {match}"):
        make_point(val_func=of_next)
    with pytest.raises(ValueError, match=f"exploration_bonus {match}"):
        CEMPlanner(make_point(), exploration_bonus=of_next)
    with pytest.raises(ValueError, match=f"exploration_bonus {match}"):
        PredictorEnv(make_point(), exploration_bonus=of_next)


ENDS = {
    "returns": lambda p: p.returns(
        *torch.zeros(2, 2, 1), torch.zeros(2, 3, 1), use_value_func=True
    ),
    "env": lambda p: PredictorEnv(p, use_value_func=True).rollout(2),
    "planner": lambda p: plan(CEMPlanner(p, use_value_func=True)),
    "value": lambda p: p.value(torch.zeros(2, 2)),
    "operator": lambda p: value_operator(p)(
        TensorDict({"state": [[0.0]], "context": [[0.0]]}, [1])
    ),
}


def plan(planner):
    planner(TensorDict({"observation": torch.zeros(2, 2)}, [2]).update(planner.forget([2])))


@pytest.mark.parametrize("call", ENDS)
@pytest.mark.parametrize(
    "func",
    [lambda s, c, a: a[..., 0], lambda s, c, a: (s * a).sum(-1), RewardNet(1, 1, 1)],
    ids=["indexes", "multiplies", "net"],
)
def test_a_function_of_the_action_is_not_asked_where_none_is_chosen(call, func):
    predictor = make_point(val_func=func)
    assert predictor.value(torch.zeros(2, 2), torch.ones(2, 1)).shape == (2,)
    with pytest.raises(TypeError, match="val_func failed where no action is chosen yet"):
        ENDS[call](predictor)


CALLS = {
    "predict": lambda p, td, plan: p.predict(td["observation"], td["action"]),
    "step": lambda p, td, plan: p.step(td),
    "rollout": lambda p, td, plan: p.rollout(td["observation"], plan),
    "returns": lambda p, td, plan: p.returns(td["state"], td["context"], plan),
    "env": lambda p, td, plan: PredictorEnv(p).step(td),
}
WRONG = {
    "shape": (lambda x: x[..., :1], ValueError, r"{} gave shape \(.*1\), expected \(2"),
    "nan": (lambda x: x[..., 0] * math.nan, ValueError, r"{}|imagined returns"),
}
WRONG_PROBABILITY = {
    "negative": (lambda x: -x[..., 0].exp(), ValueError, r"{} gave values .* outside \[0, 1\]"),
    "above 1": (lambda x: 1.0 + x[..., 0].exp(), ValueError, r"{} gave values .* outside \[0, 1\]"),
    "integer": (lambda x: x[..., 0].long(), TypeError, r"{} gave torch.int64, expected bool"),
}
CASES = [("rew_func", *case) for case in WRONG.values()]
CASES += [("term_func", *case) for case in (WRONG | WRONG_PROBABILITY).values()]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("part", "wrong", "kind", "match"), CASES)
@pytest.mark.parametrize("looks_ahead", [True, False])
def test_what_a_function_gives_is_checked(call, part, wrong, kind, match, looks_ahead):
    if looks_ahead:
        func = reads_next_state(lambda s, c, a, after: wrong(after))
    else:

        def func(s, c, a):
            return wrong(s)

    model = make_ensemble(2, 1, n_models=3, n_modes=2, n_particles_per_model=2)
    functions = {"rew_func": lambda s, c, a: s[..., 0]} | {part: func}
    encoder = FixedEncoderNet((3,), [0, 1], [2])
    reward, term_func = functions["rew_func"], functions.get("term_func")
    predictor = StaticPredictor(model, None, reward, encoder, 2, 1, term_func=term_func)
    predictor.requires_grad_(False)
    td = predictor.encode(TensorDict({"observation": torch.randn(2, 3)}, [2]))
    td["action"] = torch.zeros(2, 1)
    # Members and particles come after the batch in all but returns, which has members first.
    match = match.replace(r"\(2", r"\([23]").format(part)
    with pytest.raises(kind, match=match):
        CALLS[call](predictor, td, torch.zeros(2, 3, 1))


def test_a_function_that_does_not_say_so_is_given_three_arguments():
    seen = []

    def reward(*inputs):
        seen.append(len(inputs))
        return inputs[0][..., 0]

    predictor = make_point(rew_func=reward)
    predictor.rollout(torch.zeros(2), torch.zeros(3, 1))
    predictor.predict(torch.zeros(2), torch.zeros(1))
    assert seen == [3, 3]


class Short(nn.Module):
    def forward(self, state, context):
        return state[..., 0]


@pytest.mark.parametrize("name", ["rew_func", "term_func", "val_func", "exploration_bonus"])
@pytest.mark.parametrize(
    "func",
    [
        lambda state: state[..., 0],
        lambda state, action: state[..., 0],
        lambda state, context, action, goal, more: state[..., 0],
        Short(),
        partial(lambda state, context, action: state[..., 0], torch.zeros(1)),
    ],
    ids=["one", "two", "five", "module", "partial"],
)
def test_functions_with_other_arguments_are_refused_when_given(name, func):
    """Asked later, in a plan, they fail with an error of Python that names neither."""
    message = rf"{name} takes the arguments \(.*called with \(state, context, action\)"
    if name == "exploration_bonus":
        with pytest.raises(TypeError, match=message):
            PredictorEnv(make_point(), exploration_bonus=func)
        with pytest.raises(TypeError, match=message):
            ICEMPlanner(make_point(), horizon=2, exploration_bonus=func)
        return
    with pytest.raises(TypeError, match=message):
        PredictorFactory(**{name: func})
    if name != "term_func":
        with pytest.raises(TypeError, match=message):
            make_point(**{name: func})


class Dispatched(TensorDictModuleBase):
    """Its signature has one argument, but it is called with its keys."""

    in_keys = ["state", "context", "action"]
    out_keys = ["sum"]

    @dispatch
    def forward(self, tensordict):
        return tensordict.set("sum", tensordict["state"].sum(-1) + tensordict["action"].sum(-1))


@pytest.mark.parametrize(
    "func",
    [
        Dispatched(),
        TensorDictModule(
            lambda *x: x[0].sum(-1) + x[2].sum(-1), ["state", "context", "action"], ["sum"]
        ),
    ],
    ids=["own", "torchrl"],
)
def test_tensordict_modules_are_functions_of_their_keys(func):
    predictor = PredictorFactory(hidden_sizes=(8,), rew_func=func)(
        Unbounded((3,)), Bounded(-1.0, 1.0, (2,))
    )
    state, action = torch.randn(4, 3), torch.rand(4, 2)
    torch.testing.assert_close(predictor.predict_reward(state, action), func(state, state, action))
    short = TensorDictModule(lambda *x: x[0].sum(-1), ["state", "action"], ["sum"])
    message = r"takes the arguments of its in_keys \['state', 'action'\], but is called with"
    with pytest.raises(TypeError, match=message):
        PredictorFactory(rew_func=short)


def test_functions_that_do_not_say_what_they_take_are_taken():
    check_step_function("rew_func", torch.maximum)  # as many of torch


def test_functions_that_declare_a_next_state_take_one():
    short = reads_next_state(lambda state, context, action: state[..., 0])
    with pytest.raises(TypeError, match=r"called with \(state, context, action, next_state\)"):
        PredictorFactory(rew_func=short)
    with pytest.raises(TypeError, match="takes the arguments"):  # no advice that would be refused
        PredictorFactory(val_func=lambda state, context, action, next_state: state[..., 0])


@pytest.mark.parametrize("name", ["rew_func", "term_func"])
def test_a_function_that_does_not_say_what_it_reads_is_refused(name):
    undeclared = {name: lambda s, c, a, ns: ns[..., 0]}
    with pytest.raises(TypeError, match=rf"{name} takes four .*\(s, c, a, ns\).*@reads_next_state"):
        PredictorFactory(**undeclared)
    with pytest.raises(TypeError, match=name):
        make_predictor(**undeclared)


def test_whatever_three_arguments_suffice_is_taken():
    for func in (
        lambda s, c, a, scale=2.0: scale * s[..., 0],
        lambda *taken: taken[0][..., 0],
        partial(lambda scale, s, c, a: scale * s[..., 0], 2.0),
        torch.nn.Sequential(torch.nn.Identity()).__call__,  # its signature says nothing
    ):
        PredictorFactory(rew_func=func, term_func=func)
