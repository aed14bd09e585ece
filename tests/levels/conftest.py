"""Levels around small predictors, and what environments would hand to them."""

from __future__ import annotations

from functools import partial

import pytest
from tensordict import TensorDict
from torchrl.data import Bounded, Unbounded

from layeredrl_torchrl import ICEMPlanner, PlannerLevel, PredictorFactory

SMALL = partial(ICEMPlanner, horizon=2, n_samples=24, n_iterations=2)


@pytest.fixture
def make_level(make_point):
    """Build a level that plans in the point's known world, without random steps unless asked."""

    def build(**options):
        given = {
            "predictor_factory": lambda observation_space, action_space: make_point(),
            "planner_factory": SMALL,
            "n_initial_random_steps": 0,
        }
        if "env" not in options:
            given["observation_space"] = Unbounded((2,))
            given["action_space"] = Bounded(-1.0, 1.0, (1,))
        return PlannerLevel(**given | options)

    return build


@pytest.fixture
def make_learner(make_level):
    """Build a level with a small predictor that learns."""
    factory = PredictorFactory(hidden_sizes=(8,), n_models=2)
    return partial(make_level, predictor_factory=factory, batch_size=8, model_batch_size=8)


@pytest.fixture
def observe():
    """``observe(level, obs [*b, n])``: what an environment hands over after a reset."""

    def build(level, obs):
        batch = obs.shape[:-1]
        carried = level.make_tensordict_primer().primers.zero(batch)
        return TensorDict({"observation": obs, **carried.to_dict()}, batch)

    return build
