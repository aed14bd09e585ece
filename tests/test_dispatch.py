"""Tensors given by name: the same as a TensorDict of them."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded, Categorical, Composite, Unbounded

from layeredrl_torchrl import ICEMPlanner, IdentityEncoder, PredictorFactory
from layeredrl_torchrl.nets import ModuleEncoder
from layeredrl_torchrl.objectives import ConsistencyLoss, TermsLoss

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
def test_tensors_by_name_give_what_a_tensordict_gives(predictor, part):
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


def test_a_loss_of_single_steps_by_name(predictor):
    """Slices of one step, [B, 1]."""
    loss = ConsistencyLoss(predictor.encoder, predictor.model)
    td = TensorDict({key: GIVEN[key].flatten(0, 1).unsqueeze(1) for key in loss.in_keys}, [20, 1])
    named = {key if isinstance(key, str) else "_".join(key): td[key] for key in loss.in_keys}
    torch.testing.assert_close(loss(**named), loss(td)["loss_consistency"])
    for key in loss.in_keys:
        with pytest.raises(KeyError, match=r"ConsistencyLoss reads .*missing.*in_keys="):
            loss(td.exclude(key))
    with pytest.raises(ValueError, match=r"slices of one step, \[B, 1\], got .* \(20,\)"):
        loss(td.squeeze(1))


class Size(TermsLoss):
    """A loss of one's own, which does not say what it reads."""

    def terms(self, prepared):
        return {"loss_size": prepared["observation"].square().mean()}


def test_a_module_without_names_asks_for_a_tensordict():
    with pytest.raises(TypeError, match="Size takes a TensorDict; got observation"):
        Size()(observation=torch.zeros(5, 3))


def given(module, data):
    """The same tensors by name, in the module's order and in the other one."""
    keys = [key for key in module.in_keys if key in data.keys(True)]
    for order in (keys, keys[::-1]):
        yield {key if isinstance(key, str) else "_".join(key): data[key] for key in order}


def assert_by_name_is_by_tensordict(module, data):
    torch.manual_seed(1)
    expected = module(data.clone())
    for named in given(module, data):
        torch.manual_seed(1)
        found = module(**named)
        for key, value in zip(module.out_keys, found, strict=True):
            torch.testing.assert_close(value, expected[key])


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_images_by_name_give_what_a_tensordict_gives(batch):
    """Whatever entry comes first, and of integers, too."""
    data = TensorDict(
        {
            "camera": torch.randint(0, 255, (*batch, 3, 2, 2), dtype=torch.uint8),
            ("arm", "position"): torch.randn(*batch, 2),
            "action": torch.zeros(*batch, 1),
        },
        batch,
    )
    shapes = {"camera": (3, 2, 2), ("arm", "position"): (2,)}
    assert_by_name_is_by_tensordict(IdentityEncoder(shapes), data)
    factory = PredictorFactory(
        hidden_sizes=(8,),
        n_models=5,
        observation_key=["camera"],
        partial_encoder=lambda shape: ModuleEncoder(Flat(), shape, 4),
    )
    spec = Composite(camera=Unbounded((3, 2, 2), dtype=torch.uint8))
    predictor = factory(spec, Bounded(-1.0, 1.0, (1,)))
    assert_by_name_is_by_tensordict(predictor.encoder, data)
    assert_by_name_is_by_tensordict(predictor, data)
    planner = ICEMPlanner(predictor, horizon=2, n_samples=24)
    assert_by_name_is_by_tensordict(planner, data.update(planner.forget(batch)))


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 4)

    def forward(self, pixels):
        return self.linear(pixels.flatten(1) / 255)


@pytest.mark.parametrize("one_hot", [False, True])
def test_choices_by_name_give_what_a_tensordict_gives(one_hot):
    """They have no axis of their own as integers, and one as flags."""
    predictor = PredictorFactory(hidden_sizes=(8,), n_models=5)(Unbounded((3,)), Categorical(2))
    action = torch.randint(2, (5, 4))
    data = TensorDict(GIVEN, [5, 4]).set("action", action)
    if one_hot:
        data.set("action", nn.functional.one_hot(action, 2).bool())
    assert_by_name_is_by_tensordict(predictor, data.select("observation", "action"))
    assert_by_name_is_by_tensordict(predictor.model, data.select("state", "context", "action"))
    for loss in (predictor.model_loss, predictor.predictor_loss):
        assert_by_name_is_by_tensordict(loss, data)
