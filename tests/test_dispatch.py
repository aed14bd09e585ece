"""Tensors given by name: the same as a TensorDict of them."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Unbounded

from layeredrl_torchrl import ICEMPlanner, PredictorFactory

NO = torch.zeros(5, 4, 1, dtype=torch.bool)
GIVEN = {
    "observation": torch.randn(5, 4, 3),
    "state": torch.randn(5, 4, 3),
    "context": torch.zeros(5, 4, 0),
    "action": torch.rand(5, 4, 1),
    ("next", "observation"): torch.randn(5, 4, 3),
    ("next", "state"): torch.randn(5, 4, 3),
    ("next", "reward"): torch.randn(5, 4, 1),
    ("next", "terminated"): NO,
    "valid": ~NO[..., 0],
}


@pytest.fixture
def predictor():
    factory = PredictorFactory(hidden_sizes=(8,), n_models=5)
    return factory(Unbounded((3,)), Bounded(-1.0, 1.0, (1,)))


@pytest.mark.parametrize(
    "part", ["encoder", "model", "predictor", "model_loss", "predictor_loss", "planner"]
)
def test_by_name_and_by_tensordict(predictor, part):
    td = TensorDict({}, [5, 4])
    if part == "planner":
        module = ICEMPlanner(predictor, horizon=2, n_samples=24)
        td = td.update(module.forget([5, 4]))
    else:
        module = predictor if part == "predictor" else getattr(predictor, part)
    for key in module.in_keys:
        if key in GIVEN:
            td.set(key, GIVEN[key])
    named = {key if isinstance(key, str) else "_".join(key): td[key] for key in module.in_keys}
    torch.manual_seed(1)
    found = module(**named)
    torch.manual_seed(1)
    expected = module(td)
    assert len(found) == len(module.out_keys)
    for key, value in zip(module.out_keys, found, strict=True):
        torch.testing.assert_close(value, expected[key])
    with pytest.raises(TypeError, match=rf"by name: {next(iter(named))}.*got foo"):
        module(foo=1)
