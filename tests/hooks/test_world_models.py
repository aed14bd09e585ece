"""TorchRL's world models in this package's planners, levels and imagination."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import SMALL_PLANNER, collected, observed, planner_level
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torchrl.data import Bounded
from torchrl.envs import GymEnv
from torchrl.modules import MLP, WorldModel, WorldModelWrapper

from layeredrl_torchrl import ICEMPlanner, PredictorEnv
from layeredrl_torchrl.predictors import from_world_model

ACTION = Bounded(-1.0, 1.0, (1,))
LATENT = {"in_keys": ["latent", "action"], "out_keys": [("next", "latent")]}


def world_model(obs_dim=3, latent_dim=4, rewarded=("next", "latent")):
    torch.manual_seed(0)
    return WorldModel(
        Mod(MLP(obs_dim, latent_dim), ["observation"], ["latent"]),
        Mod(MLP(latent_dim + 1, latent_dim), **LATENT),
        Mod(MLP(latent_dim, 1), [rewarded], [("next", "reward")]),
        done_head=Mod(lambda x: x[..., :1] > 0.3, [("next", "latent")], [("next", "done")]),
    )


@pytest.mark.parametrize("rewarded", ["latent", ("next", "latent")])
@torch.no_grad()
def test_a_rollout_is_what_the_world_model_says_step_by_step(rewarded):
    world = world_model(rewarded=rewarded)
    predictor = from_world_model(world, (3,), ACTION, latent_dim=4)
    obs, actions = torch.randn(5, 3), 2 * torch.rand(5, 4, 1) - 1
    traj = predictor.rollout(obs, actions)[:, 0, 0]
    td = world.encode(TensorDict({"observation": obs}, [5]))
    for t in range(4):
        td = world.step(td.set("action", actions[:, t]))
        torch.testing.assert_close(traj["next", "state"][:, t], td["next", "latent"])
        torch.testing.assert_close(traj["next", "reward"][:, t], td["next", "reward"])
        assert torch.equal(traj["next", "term_prob"][:, t] > 0.5, td["next", "done"])
        td = td["next"].select("latent")
    env = PredictorEnv(predictor)
    first = env.step(TensorDict({"state": traj["state"][:, 0], "action": actions[:, 0]}, [5]))
    torch.testing.assert_close(first["next", "reward"], traj["next", "reward"][:, 0])


def test_a_planner_finds_the_way_in_a_wrapped_world_model():
    """A point moves by half the action; the reward reads where it is then."""
    wrapped = WorldModelWrapper(
        Mod(lambda x, a: x + 0.5 * a, ["place", "action"], ["place"]),
        Mod(lambda x: -x.square(), ["place"], ["reward"]),
    )
    options = {"latent_dim": 1, "latent_key": "place"}
    predictor = from_world_model(wrapped, (1,), ACTION, **options)
    planner = ICEMPlanner(predictor, horizon=3, n_samples=64)
    obs = torch.tensor([[0.2], [-0.4], [3.0]])
    best = (-2 * obs).clamp(-1, 1)
    found = planner(observed(planner, obs))["action"]
    torch.testing.assert_close(found, best, atol=0.1, rtol=0)


def test_a_level_acts_by_a_world_model():
    env = GymEnv("Pendulum-v1")
    factory = partial(from_world_model, world_model(), latent_dim=4)
    level = planner_level(
        env=env,
        predictor_factory=lambda _, action: factory((3,), action),
        planner_factory=SMALL_PLANNER,
    )
    (data,) = collected(env, level, 1)
    assert env.action_spec.is_in(data["action"])
    assert level.learn(data)["n_env_steps"] == 20


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: from_world_model(MLP(3, 4), (3,), ACTION, latent_dim=4), "WorldModel"),
        (
            lambda: from_world_model(
                world_model(), (3,), ACTION, latent_dim=4, latent_key="z"
            ).encode(torch.zeros(2, 3)),
            "name the latent by latent_key=",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises((TypeError, KeyError), match=message):
        call()
