"""What an imagined environment takes: actions of its space, and states without a context."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import Bounded, LazyMemmapStorage, TensorDictReplayBuffer
from torchrl.envs import Compose, ExcludeTransform, StepCounter, TransformedEnv

from layeredrl_torchrl import Expectation, PredictorEnv, TSInfinity


@pytest.mark.parametrize("propagation", [Expectation(), TSInfinity()])
def test_an_action_outside_its_space_is_refused(make_predictor, propagation):
    env = PredictorEnv(
        make_predictor(), Bounded(-0.5, 1.0, (1,)), propagation=propagation, batch_size=[3]
    )
    for action, fits in ((1.0, True), (-0.6, False), (float("nan"), False)):
        td = env.reset().set("action", torch.tensor([[0.0], [action], [0.0]]))
        if fits:
            assert env.step(td)["next", "state"].isfinite().all()
            continue
        with pytest.raises(ValueError, match=r"\[1, 0\] is outside the action space.*project"):
            env.step(td)


def test_an_empty_context_may_be_left_out_for_a_memory_map(make_predictor):
    env = PredictorEnv(make_predictor(), batch_size=[4], initial_states=starts_of_two)
    env = TransformedEnv(env, Compose(ExcludeTransform("context"), StepCounter(3)))
    memory = TensorDictReplayBuffer(storage=LazyMemmapStorage(100), batch_size=8)
    for data in Collector(env, None, frames_per_batch=40, total_frames=40):
        memory.extend(data.reshape(-1))
    assert memory.sample()["next", "state"].shape == (8, 2)
    assert "context" not in memory[:].keys()


def starts_of_two(n):
    return TensorDict({"state": torch.randn(n, 2)}, [n])
