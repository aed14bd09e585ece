"""Learning with renamed entries, in other dtypes, and where gradients are off."""

from __future__ import annotations

import pytest
import torch
from helpers import learn, make_buffer, make_predictor, make_transitions, parameters, parts_moved
from torchrl.data import Bounded, Composite, LazyTensorStorage, OneHot, ReplayBuffer, Unbounded

from layeredrl_torchrl import PredictorFactory

KEYS = {"reward": ("next", "gain"), "terminated": ("next", "ended"), "valid": "belongs"}


def test_renamed_and_nested_keys_learn_the_same():
    found = []
    for observation, action in [("observation", "action"), (("agents", "see"), ("agents", "do"))]:
        torch.manual_seed(0)
        data = make_transitions(60)
        data = data.rename_key_("observation", observation).rename_key_("action", action)
        data["next"].rename_key_("observation", observation)
        space = Composite(shape=())
        space[observation] = Unbounded((2,))
        factory = PredictorFactory(
            hidden_sizes=(8,), n_models=2, observation_key=observation, action_key=action
        )
        predictor = factory(space, Bounded(-1.0, 1.0, (1,)))
        assert predictor(data.clone())["next", "reward"].shape == (60, 1)
        assert predictor.in_keys == [observation, action]
        if found:
            predictor.predictor_loss.set_keys(**KEYS)
            data.rename_key_(("next", "reward"), KEYS["reward"])
            data.rename_key_(("next", "terminated"), KEYS["terminated"])
        buffer = ReplayBuffer(storage=LazyTensorStorage(60))
        buffer.extend(data)
        found.append(learn(predictor, buffer))
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_predictor_that_was_cast_learns_and_predicts(dtype):
    predictor = make_predictor().to(dtype)
    learn(predictor, make_buffer())
    mean = predictor.predict(torch.randn(4, 2), torch.zeros(4, 1))[0]
    assert mean.dtype == dtype
    assert mean.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_trained_predictor_can_be_cast_and_goes_on(dtype):
    predictor, buffer = make_predictor(), make_buffer()
    learn(predictor, buffer)
    predictor.to(dtype)
    before = parameters(predictor)
    learn(predictor, buffer)
    assert {"model", "rew_func", "val_func"} <= parts_moved(predictor, before)
    twins = [make_predictor() for _ in range(2)]
    twins[1].load_state_dict(twins[0].state_dict())
    for twin in twins:
        torch.manual_seed(0)
        learn(twin, buffer)
    twins[1].double().float()  # which changes no number
    for twin in twins:
        torch.manual_seed(1)
        learn(twin, buffer)
    torch.testing.assert_close(twins[1].state_dict(), twins[0].state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("space", [Bounded(-1.0, 1.0, (1,)), OneHot(3)])
def test_torch_saves_whole_predictors(space, tmp_path):
    predictor = make_predictor(model={"action_space": space})
    torch.save(predictor, tmp_path / "predictor.pt")
    other = torch.load(tmp_path / "predictor.pt", weights_only=False)
    obs, action = torch.randn(4, 2), space.rand((4,))
    for a, b in zip(predictor.predict(obs, action), other.predict(obs, action), strict=True):
        assert torch.equal(a, b)


def test_the_default_dtype_of_a_script_is_not_that_of_a_predictor():
    predictor, buffer = make_predictor(), make_buffer()
    torch.set_default_dtype(torch.float64)
    try:
        learn(predictor, buffer)
        assert predictor.predict_reward(torch.zeros(3, 2), torch.zeros(3, 1)).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_learning_turns_gradients_on_by_itself(mode):
    found = []
    for context in (torch.enable_grad, mode):
        torch.manual_seed(0)
        predictor, buffer = make_predictor(), make_buffer()
        with context():
            found.append(learn(predictor, buffer))
    assert found[0] == found[1]
