"""Imagined episodes that are cut where the model leaves its data."""

from __future__ import annotations

import pytest
import torch
from gradient_parts import ACTION, make_learned, make_line
from torchrl.data import Unbounded
from torchrl.envs import ExcludeTransform, StepCounter, TransformedEnv

from layeredrl_torchrl import PredictorEnv, ProbabilisticEnsemble
from layeredrl_torchrl.imagination import Disagrees, OutOfRange, TruncateWhere


def test_episodes_are_cut_where_the_model_leaves_its_data():
    predictor = make_learned(horizon=1).predictor
    model = predictor.model
    state, action = 0.1 * torch.randn(500, 2), ACTION.rand((500,))
    model.fit_statistics(state, state[:, :0], action, state + 0.5)
    env = PredictorEnv(predictor, batch_size=[16])
    env = env.append_transform(TruncateWhere(OutOfRange(model, limit=2.0)))
    data = env.rollout(30, break_when_any_done=False)
    far = ((data["next", "state"] - model.scaling.state.loc) / model.scaling.state.scale).abs() > 2
    after = data["next"]
    assert far.any()
    torch.testing.assert_close(after["truncated"], far.any(-1, keepdim=True) & ~after["terminated"])
    torch.testing.assert_close(after["done"], after["truncated"] | after["terminated"])
    ended = after["done"][:, :-1, 0]
    assert (data["state"][:, 1:][ended] == 0).all()  # begun anew
    agreeing = Disagrees(model, limit=1e9)
    step = state[:3], state[:3, :0], action[:3], state[:3]
    assert not agreeing(*step).any()
    assert Disagrees(model, limit=1e-9)(*step).all()
    for kind in (OutOfRange, Disagrees):
        with pytest.raises(TypeError, match="ProbabilisticEnsemble"):
            kind(predictor, limit=1.0)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_conditions_are_asked_for_batches_of_any_shape(batch):
    predictor = make_learned(horizon=1).predictor
    model, contexts = predictor.model, set()

    def condition(state, context, action, after):
        contexts.add(tuple(context.shape))
        assert Disagrees(model, 1e9)(state, context, action, after).shape == batch
        return OutOfRange(model, limit=0.1)(state, context, action, after)

    env = PredictorEnv(predictor, batch_size=batch).append_transform(TruncateWhere(condition))
    env = env.append_transform(ExcludeTransform("context"))
    after = env.rollout(4, break_when_any_done=False)["next"]
    expected = (after["state"].abs() > 0.1).any(-1, keepdim=True)  # no statistics yet
    assert torch.equal(after["truncated"], expected & ~after["terminated"])
    assert contexts == {(*batch, 0)}


@pytest.mark.parametrize("first", [True, False])
def test_what_another_transform_truncates_stays_truncated(first):
    def beyond(limit):
        return TruncateWhere(lambda state, context, action, after: after[..., 0] > limit)

    torch.manual_seed(0)
    others = [StepCounter(4), beyond(1.5)]
    env = PredictorEnv(make_line().predictor, batch_size=[8])
    for transform in [*others, beyond(3.0)] if first else [beyond(3.0), *others]:
        env = env.append_transform(transform)
    # The context is empty, and may be left out.
    env = env.append_transform(ExcludeTransform("context"))
    after = env.rollout(30, break_when_any_done=False)["next"]
    expected = (after["state"] > 1.5) | (after["step_count"] == 4)
    assert torch.equal(after["truncated"], expected)
    assert torch.equal(after["done"], expected)
    assert (expected & (after["step_count"] < 4)).any()


def test_a_range_in_stds_needs_statistics():
    model = ProbabilisticEnsemble(Unbounded((2,)), None, ACTION, normalize_inputs=False)
    with pytest.raises(ValueError, match=r"normalize_inputs=False has no statistics"):
        OutOfRange(model)


def test_a_condition_gives_bools_and_finds_what_it_reads():
    env = PredictorEnv(make_line().predictor, batch_size=[8])
    soft = TruncateWhere(lambda state, context, action, after: after[..., 0].sigmoid())
    with pytest.raises(TypeError, match=r"float32, expected bool"):
        TransformedEnv(env, soft).rollout(2)
    other = TruncateWhere(OutOfRange(make_learned().predictor.model), in_keys=("z", "c", "a"))
    with pytest.raises(KeyError, match="in_keys"):
        TransformedEnv(env, other).rollout(2)
