"""torch.compile, torch.export and TorchRL's world models."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    SMALL_FACTORY,
    SMALL_PLANNER,
    collected,
    make_predictor,
    make_transitions,
    model_free_level,
    observed,
    parameters,
    parts_moved,
)
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Bounded, Unbounded
from torchrl.envs.model_based import WorldModelEnv
from torchrl.modules import WorldModel
from torchrl.objectives import WorldModelLoss

from layeredrl_torchrl import IdentityEncoder, PredictorEnv, get_task
from layeredrl_torchrl.nets import TanhActor

SPACES = Unbounded((2,)), Bounded(-1.0, 1.0, (1,))
TASK = get_task("InvertedPendulum-v5")


def test_a_step_of_an_imagined_environment_compiles():
    env = PredictorEnv(make_predictor())
    td = TensorDict(state=torch.randn(5, 2), context=torch.zeros(5, 0), action=torch.rand(5, 1))
    td.batch_size = [5]
    step = torch.compile(env.step, backend="eager")
    plain, compiled = env.step(td.clone()), step(td.clone())
    for key in ("state", "reward", "terminated"):
        torch.testing.assert_close(plain["next", key], compiled["next", key])


def test_a_collector_compiles_a_planner():
    env = TASK.make()
    planner = SMALL_PLANNER(SMALL_FACTORY(env.observation_spec, env.action_spec))
    (data,) = collected(env, planner, 1, 6, compile_policy={"backend": "eager"})
    assert env.action_spec.is_in(data["action"])
    assert data["planner", "warm"][1:].any()


class Act(nn.Module):
    """What of a policy is exported: tensors in, tensors out."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, observation):
        if hasattr(self.policy, "make_tensordict_primer"):
            td = observed(self.policy, observation)  # an episode begins
        else:
            td = TensorDict({"observation": observation}, observation.shape[:1])
        return self.policy(td)["action"]


POLICIES = {
    "planner": lambda: SMALL_PLANNER(make_predictor()),
    "model-free level": lambda: model_free_level(*SPACES),
    "encoder and actor": lambda: TensorDictSequential(
        IdentityEncoder((2,)), TanhActor(2, 0, SPACES[1], (8,))
    ),
}


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("name", POLICIES)
def test_policies_are_exported(name):
    act, observation = Act(POLICIES[name]()).eval(), torch.randn(3, 2)
    exported, actions = torch.export.export(act, (observation,)).module(), []
    for call in (act, exported):
        torch.manual_seed(0)
        actions.append(call(observation))
    assert SPACES[1].is_in(actions[0])
    torch.testing.assert_close(*actions)


def test_torchrls_loss_of_world_models_trains_the_reward():
    predictor = make_predictor()
    loss = WorldModelLoss(predictor, losses=["reward"])
    before = parameters(predictor)
    optimizer = torch.optim.Adam(predictor.parameters(), 1e-2)
    for _ in range(3):
        losses = loss(make_transitions())
        optimizer.zero_grad()
        losses["loss_reward"].backward()
        optimizer.step()
    assert losses["loss_reward"].isfinite()
    assert parts_moved(predictor, before) == {"rew_func"}


def test_torchrls_environment_of_world_models_loses_an_axis_even_with_its_own_model():
    """When TorchRL mends it, the manual's row about it has to change."""
    dynamics = TensorDictModule(nn.Linear(5, 4), ["both"], [("next", "latent")])
    parts = {
        "encoder": TensorDictModule(nn.Linear(4, 4), ["observation"], ["latent"]),
        "dynamics": dynamics,
        "reward_head": TensorDictModule(
            nn.Linear(4, 1), [("next", "latent")], [("next", "reward")]
        ),
    }
    env = WorldModelEnv(WorldModel(**parts), TASK.make(), batch_size=[3])
    assert env.action_spec.shape == (3,)  # and not [3, 1]
    assert PredictorEnv(make_predictor(), batch_size=[3]).action_spec.shape == (3, 1)
