"""What an imagined environment takes: actions of its space, and states without a context."""

from __future__ import annotations

import pytest
import torch
from helpers import Known
from tensordict import TensorDict
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Bounded, LazyMemmapStorage, TensorDictReplayBuffer
from torchrl.envs import Compose, ExcludeTransform, StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs

from layeredrl_torchrl import (
    Expectation,
    IdentityEncoder,
    PredictorEnv,
    StaticPredictor,
    TSInfinity,
)


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


class Own(nn.Module):
    """A member of one's own, which takes what it is given as it is."""

    def __init__(self, *spaces):
        super().__init__()
        self.layer = nn.Linear(3, 5)

    def forward(self, state, context, action):
        out = self.layer(torch.cat([state, action], -1)).unsqueeze(-2)
        mean, std, term = out.split([2, 2, 1], -1)
        return (mean, std.exp()), torch.ones_like(term[..., 0]), term[..., 0, 0].sigmoid()


@pytest.mark.parametrize("kind", ["known", "own networks", "built in"])
def test_the_model_takes_actions_in_its_own_precision(make_predictor, propagation, kind):
    """Tasks of dm_control have actions of float64."""
    space = Bounded(-1.0, 1.0, (1,), dtype=torch.float64)
    if kind == "known":
        model = Known(lambda state, action: state + action, 2, space)
        reward = lambda state, context, action: -state.square().sum(-1)  # noqa: E731
        predictor = StaticPredictor(model, None, reward, IdentityEncoder((2,)), 2)
    else:
        own = {"partial_net": Own} if kind == "own networks" else {}
        predictor = make_predictor(model={"action_space": space, **own})
    env = PredictorEnv(predictor, propagation=propagation, batch_size=[3])
    check_env_specs(env)
    steps = env.rollout(3)
    assert steps["action"].dtype == torch.float64
    assert steps["next", "state"].dtype == torch.float32


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
