"""Arguments of another kind than is meant: the error names what came and what was expected."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from gradient_parts import make_learned
from helpers import (
    SPACES,
    Kept,
    make_buffer,
    make_ensemble,
    make_point,
    make_predictor,
    model_free_level,
    planner_level,
    unchanged,
)

import layeredrl_torchrl as lrl
from layeredrl_torchrl.nets import Landmarks, QValueOperator, TanhActor

ACTION = torch.zeros(3, 1)


def transitions(**changes):
    given = dict.fromkeys(("state", "next_state"), torch.randn(5, 2))
    return given | {"context": torch.zeros(5, 0), "action": torch.zeros(5, 1)} | changes


WRONG_KIND = {
    "an array": (lambda: make_predictor().predict(np.zeros((3, 2)), ACTION), "torch.as_tensor"),
    "nothing": (lambda: make_predictor().predict(None, ACTION), "got NoneType"),
    "a tensor for a policy": (lambda: model_free_level(*SPACES)(torch.zeros(3, 2)), "got Tensor"),
    "a dictionary": (lambda: planner_level(*SPACES)({"observation": 0}), "got dict"),
    "bool actions": (
        lambda: make_predictor().predict(torch.zeros(3, 2), ACTION.bool()),
        "action has dtype torch.bool, expected floats",
    ),
    "a std in words": (
        lambda: make_predictor().model.get_log_prob(**transitions(std="1")),
        "std must be a number",
    ),
    "a logger's class": (
        lambda: make_predictor().learn(make_buffer(), 1, 8, 8, 60, logger=Kept),
        "logger must be .* got Kept",
    ),
    "a task for a level": (
        lambda: planner_level(env=lrl.get_task("Reacher-v5")),
        "env must be an object of EnvBase, got Task",
    ),
    "a name for a hierarchy": (
        lambda: lrl.Hierarchy([planner_level()], env="Reacher-v5"),
        "env must be an object of EnvBase, got str",
    ),
    "a word for keys": (lambda: planner_level(*SPACES, store_keys="abc"), "store_keys must be"),
    "a number for a key": (lambda: planner_level(*SPACES, store_keys=[3]), "store_keys must be"),
    "a number for a batch": (lambda: lrl.PredictorEnv(make_point(), batch_size=3), "batch_size"),
    "an imagined world of an environment": (
        lambda: lrl.PredictorEnv(lrl.PredictorEnv(make_point())),
        "predictor must be an object of Predictor, got PredictorEnv",
    ),
    "starts of a model": (
        lambda: lrl.FromBuffer(make_buffer(), make_ensemble()),
        "predictor must be an object of Predictor, got ProbabilisticEnsemble",
    ),
    "proposals in a class": (
        lambda: lrl.PolicyProposal(lrl.RewardPredictor, planner_level(*SPACES)),
        "predictor must be an object of Predictor, got the class RewardPredictor",
    ),
    "statistics of nothing": (
        lambda: make_ensemble().fit_statistics(**transitions(context=None)),
        "context must be an object of Tensor, got NoneType",
    ),
    "statistics of arrays": (
        lambda: make_ensemble().fit_statistics(**transitions(state=np.zeros((5, 2)))),
        "state must be an object of Tensor, got ndarray",
    ),
}


@pytest.mark.parametrize("name", WRONG_KIND)
def test_another_kind_of_argument_is_named_with_what_is_expected(name):
    call, message = WRONG_KIND[name]
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("shape", [(0,), (-1,), (2.0,), ("a",), 3, {"x": (2, 0)}, {"x": (None,)}])
def test_shapes_of_observations_are_whole_numbers(shape):
    with pytest.raises(ValueError, match="mapped_env_obs_shape has"):
        lrl.IdentityEncoder(shape)


def test_statistics_are_as_they_were_where_a_warning_is_an_error():
    model, state = make_ensemble(), torch.randn(2000, 2)
    state[7] = 1e6
    rows = transitions(state=state, context=state[:, :0], action=state[:, :1].clamp(-1, 1))
    with unchanged(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="make up the spread"):
            model.fit_statistics(**rows | {"next_state": state + 1.0})


PARTS = {
    "encoder": lambda: lrl.EncoderNet((3,), 2, 0),
    "reward": lambda: lrl.RewardNet(2, 0, SPACES[1], (4,)),
    "value": lambda: lrl.ValueNet(2, 0, (4,)),
    "dynamics": lambda: lrl.ProbFCDynamics(SPACES[0], None, SPACES[1], hidden_sizes=(4,)),
    "policy": lambda: TanhActor(2, 0, SPACES[1], (4,)),
    "critic": lambda: QValueOperator(2, 0, SPACES[1], (4,)),
    "value gradients": lambda: make_learned(horizon=1),
    "landmarks": lambda: Landmarks(2, radius=0.5),
    "planner": lambda: lrl.CEMPlanner(make_predictor(), horizon=2, n_samples=24),
    "model": make_ensemble,
    "loss of the model": lambda: lrl.ModelLoss(make_ensemble()),
    "loss of the rest": lambda: make_predictor().predictor_loss,
    "predictor": make_predictor,
}


@pytest.mark.parametrize("damage", ["shape", "missing", "unknown", "text", "nan"])
@pytest.mark.parametrize("name", PARTS)
def test_a_state_that_does_not_fit_is_not_loaded_in_part(name, damage):
    part = PARTS[name]()
    state = copy.deepcopy(dict(part.state_dict()))
    keys = [key for key, value in state.items() if value.is_floating_point() and value.numel()]
    state[keys[0]] = state[keys[0]] + 1.0  # what would be loaded first
    if damage == "missing":
        del state[keys[-1]]
    elif damage == "unknown":
        state["more"] = torch.zeros(1)
    else:
        kinds = {"shape": torch.zeros(7, 7), "text": "x", "nan": state[keys[-1]] * float("nan")}
        state[keys[-1]] = kinds[damage]
    with unchanged(part), pytest.raises(ValueError, match=r"nothing was loaded"):
        part.load_state_dict(state)
