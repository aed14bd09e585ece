"""Levels in other precisions, with frozen parameters, and with optimizers that are loaded."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from helpers import SPACES, make_transitions, model_free_level, observed, planner_level, unchanged
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, OneHot
from torchrl.modules import MLP, ValueOperator
from torchrl.objectives import DDPGLoss

from layeredrl_torchrl import CEMPlanner, DQNLearner, ICEMPlanner, MPPIPlanner
from layeredrl_torchrl.levels import LossLearner

LOWER = [torch.bfloat16, torch.float16]
SEARCH = {"horizon": 2, "n_samples": 64, "n_iterations": 2}


def ddpg(n_features, spec):
    net = nn.Sequential(MLP(n_features, 1, num_cells=[8]), nn.Tanh())
    critic = ValueOperator(MLP(n_features + 1, 1, num_cells=[8]), ["features", "action"])
    actor = TensorDictModule(net, ["features"], ["action"])
    return LossLearner(DDPGLoss(actor, critic), spec, exploration=5.0)


MAKE = {
    "SAC": model_free_level,
    "DDPG": partial(model_free_level, learner_factory=ddpg),
    "iCEM": partial(planner_level, planner_factory=partial(ICEMPlanner, **SEARCH)),
    "CEM": partial(planner_level, planner_factory=partial(CEMPlanner, **SEARCH)),
    "MPPI": partial(planner_level, planner_factory=partial(MPPIPlanner, **SEARCH)),
}


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("dtype", LOWER)
@pytest.mark.parametrize("limit", [0.3, 0.7, 123.4])  # each is rounded up in one of the two
def test_a_level_in_half_precision_stays_within_its_bounds(name, dtype, limit):
    spec = Bounded(-limit, limit, (1,))
    observations = torch.randn(64, 2)
    for n_random in (0, 1000):
        level = MAKE[name](SPACES[0], spec, n_initial_random_steps=n_random).to(dtype)
        td = level(observed(level, observations))
        assert td["action"].dtype == torch.float32
        assert td["action"].abs().max() <= spec.space.high
        assert td["action"].abs().max() > 0.5 * limit or name != "DDPG"
        data = make_transitions()
        data["action"] = td["action"][:60]
        level.updates_per_step = 0.1
        level.learn(data)
        # As in another call after learning: the memory has the dtype that its spec says.
        carried = level.make_tensordict_primer().primers
        for key in carried.keys(True, True):
            assert td["next"].get(key).dtype == carried[key].dtype


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("dtype", [*LOWER, torch.float64])
def test_levels_can_be_built_and_learn_with_another_default_dtype(name, dtype):
    data = make_transitions()
    torch.set_default_dtype(dtype)
    try:
        level = MAKE[name](*SPACES)
        assert level.learn(data)["n_updates"] > 0
        level(observed(level, data["observation"]))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_levels_of_choices_can_be_cast(dtype):
    data = make_transitions()
    data["action"] = OneHot(3).rand((60,))
    planner = MAKE["iCEM"](SPACES[0], OneHot(3))
    learner = partial(DQNLearner, hidden_sizes=(8,))
    for level in (planner, model_free_level(SPACES[0], OneHot(3), learner_factory=learner)):
        level.to(dtype)
        assert level.learn(data)["n_updates"] > 0
        action = level(observed(level, data["observation"]))["action"]
        assert (action.float().sum(-1) == 1).all()


@pytest.mark.parametrize("make", [planner_level, model_free_level])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_learning_goes_on_after_a_cast_with_its_moments(make, dtype):
    level, data = make(*SPACES), make_transitions()
    level.learn(data)
    n = {id(p): int(state["step"]) for p, state in level.optim.state.items()}
    assert n
    level.to(dtype)
    done = level.learn(data)["n_updates"]
    for p, state in level.optim.state.items():
        assert state["exp_avg"].dtype == p.dtype
        assert int(state["step"]) == n[id(p)] + done


@pytest.mark.parametrize("make", [planner_level, model_free_level])
def test_a_frozen_level_refuses_to_learn(make):
    level = make(*SPACES).requires_grad_(False)
    with (
        unchanged(level, level.optim),
        pytest.raises(RuntimeError, match=r"are frozen .*updates_per_step=0"),
    ):
        level.learn(make_transitions())
    level.updates_per_step = 0
    before = [p.clone() for p in level.parameters()]
    assert level.learn(make_transitions())["n_updates"] == 0
    assert all(map(torch.equal, before, level.parameters()))


@pytest.mark.parametrize("make", [planner_level, model_free_level])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_optimizer_loads_no_moments_that_are_not_finite(make, value):
    level = make(*SPACES)
    level.learn(make_transitions())
    state = copy.deepcopy(level.optim.state_dict())
    index = next(iter(state["state"]))
    state["state"][index]["exp_avg_sq"].flatten()[0] = value
    with (
        unchanged(level.optim),
        pytest.raises(ValueError, match=f"parameter {index}: exp_avg_sq is not finite"),
    ):
        level.optim.load_state_dict(state)
    for part in ("state", "param_groups"):
        with pytest.raises(ValueError, match=r"is not the state of an optimizer, which has"):
            level.optim.load_state_dict({part: state[part]})
