"""Values beside a large offset, one choice however it is stored, and parts that begin anew."""

from __future__ import annotations

import pytest
import torch
from torchrl.data import Categorical, OneHot

from layeredrl_torchrl import EncoderNet

SMALL = {"batch_size": 8, "model_batch_size": 8, "n_total_env_steps": 0}


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-4, 1e3), (1e3, -1e3)])
def test_values_are_learned_whatever_offset_the_rewards_have(
    make_predictor, make_transitions, make_buffer, scale, offset
):
    """States are drawn anew at each step, so the value is their first dimension plus a constant."""
    data = make_transitions(500)
    data["next", "reward"] = scale * (offset + data["observation"][:, :1] + 0 * data["action"])
    predictor = make_predictor(
        hidden=(32,), rew_func=None, gamma=0.9, n_steps=1, tau=0.05, value_lr=3e-3
    )
    predictor.learn(make_buffer(data), 200, 64, 8, 0)
    value = predictor.value(data["observation"]).detach().double()
    expected = scale * (data["observation"][:, 0] + offset / (1 - 0.9))
    wrong = (value - value.mean()) - (expected - expected.mean())
    assert wrong.square().mean().sqrt() < 0.3 * scale
    assert (value.mean() - expected.mean()).abs() < scale


def test_where_episodes_terminate_an_offset_is_the_worth_of_staying_alive(
    make_predictor, make_transitions, make_buffer
):
    data = make_transitions(100)
    data["next", "reward"] += 1e3
    data["next", "terminated"][::20] = True
    predictor = make_predictor(value_lr=0.0)
    predictor.learn(make_buffer(data), 1, **SMALL)
    assert predictor.value(data["observation"]).tolist() == [0.0] * 100
    assert predictor.val_func.out_scale.item() == pytest.approx(1e3, rel=0.01)


def test_without_a_discount_there_is_no_worth_of_an_offset(
    make_predictor, make_transitions, make_buffer
):
    data = make_transitions(100)
    data["next", "reward"] += 1e3
    predictor = make_predictor(value_lr=0.0, gamma=1.0)
    predictor.learn(make_buffer(data), 1, **SMALL)
    assert predictor.value(data["observation"]).tolist() == [0.0] * 100


@pytest.mark.parametrize(
    ("mean", "std", "share", "unit"),
    [
        (5.0, 1.0, 0.0, 1.0),
        (-12.5, 1.0, 0.5, 1.0),
        (20.0, 1.0, 1.0, 1.0),
        (100.0, 0.5, 1.0, 0.5),
        (3.0, 0.0, 0.0, 3.0),  # nothing says how much is offset
        (1e5, 1e-3, 0.0, 1e5),  # differences that float32 rounds off
        (0.0, 0.0, 0.0, 1.0),
    ],
)
def test_the_share_of_an_offset_depends_on_the_spread_beside_it(
    make_predictor, mean, std, share, unit
):
    predictor, zeros = make_predictor(), torch.zeros(4, 2)
    reward = torch.tensor([[mean - std], [mean + std]], dtype=torch.float64).repeat(2, 1)
    predictor.upkeep._rescale(reward, 0.9, (zeros, zeros[:, :0], zeros[:, :1]), zeros)
    head, values = predictor.rew_func, (predictor.val_func, predictor.target_val_func)
    rest = (mean * (1.0 - share) ** 2 * mean + std**2) ** 0.5
    assert (head.out_loc, head.out_scale) == (pytest.approx(mean), pytest.approx(unit))
    for value in values:
        assert value.out_loc.item() == pytest.approx(10.0 * share * mean)
        assert value.out_scale.item() == pytest.approx(rest or 1.0, rel=1e-5)


def test_the_worth_of_an_offset_is_discounted_over_the_time_that_steps_take(
    make_predictor, make_transitions, make_buffer
):
    data = make_transitions(100)
    data["next", "reward"] += 1e3
    data["next", "elapsed_steps"] = torch.full((100, 1), 3)
    predictor = make_predictor(value_lr=0.0, gamma=0.9)
    predictor.learn(make_buffer(data), 1, **SMALL)
    expected = torch.full((100,), 1e3 / (1.0 - 0.9**3))
    torch.testing.assert_close(predictor.value(data["observation"]), expected, rtol=1e-3, atol=0)


def test_rewards_beyond_float32_are_named(make_predictor, make_transitions, make_buffer):
    data = make_transitions(100)
    data["next", "reward"] = 1e300 * data["next", "reward"].double()
    with pytest.raises(ValueError, match=r"\('next', 'reward'\) holds .* non-finite values"):
        make_predictor().learn(make_buffer(data), 1, **SMALL)


@pytest.mark.parametrize("spec", [Categorical(1), OneHot(1)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_one_choice_may_be_stored_one_hot(
    make_predictor, make_transitions, make_buffer, spec, dtype
):
    data = make_transitions(60)
    data["action"] = torch.ones(60, 1).to(dtype)
    predictor = make_predictor(model={"action_space": spec}, holdout_share=0.5)
    predictor.learn(make_buffer(data), 200, **SMALL)  # after which it is calibrated
    predicted = predictor.predict(data["observation"], data["action"])
    assert all(x.isfinite().all() for x in predicted)


@pytest.mark.parametrize("how", ["predictor", "losses"])
def test_all_parts_begin_anew(make_predictor, make_buffer, how):
    predictor = make_predictor(EncoderNet((2,), 2, 0))
    predictor.learn(make_buffer(), 200, 8, 8, 0)
    before = {name: p.clone() for name, p in predictor.named_parameters()}
    parts = [predictor] if how == "predictor" else [predictor.model_loss, predictor.predictor_loss]
    for part in parts:
        part.reset_parameters_recursive()
    for name, parameter in predictor.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    obs, act = torch.randn(5, 2), torch.zeros(5, 1)
    reward = predictor.predict_reward(obs, act)
    torch.testing.assert_close(reward, predictor.rew_func.out_loc.expand(5))  # untrained
    assert predictor.model.calibration(torch.ones(2, 1, 2)).eq(1.0).all()
    val_func, target = predictor.val_func.state_dict(), predictor.target_val_func.state_dict()
    torch.testing.assert_close(val_func, target, rtol=0, atol=0)
