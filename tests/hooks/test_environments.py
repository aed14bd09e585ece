"""Imagined environments among TorchRL's transforms, and exploration around our policies."""

from __future__ import annotations

import pytest
import torch
from helpers import make_point, model_free_level, planner_level
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torchrl.envs import (
    ActionDiscretizer,
    ActionScaling,
    CatFrames,
    CatTensors,
    DoubleToFloat,
    InitTracker,
    ObservationNorm,
    ParallelEnv,
    RenameTransform,
    RewardClipping,
    RewardScaling,
    RewardSum,
    SerialEnv,
    StepCounter,
    TransformedEnv,
    UnsqueezeTransform,
    VecNormV2,
)
from torchrl.envs.utils import ExplorationType, check_env_specs, set_exploration_type
from torchrl.modules import (
    AdditiveGaussianModule,
    CEMPlanner,
    EGreedyModule,
    OrnsteinUhlenbeckProcessModule,
)

from layeredrl_torchrl import PredictorEnv, get_task

TASK = get_task("InvertedPendulum-v5")
TRANSFORMS = {
    "CatTensors": lambda: CatTensors(["state", "context"], "observation", del_keys=False),
    "RenameTransform": lambda: RenameTransform(["state"], ["observation"], create_copy=True),
    "CatFrames": lambda: CatFrames(2, -1, in_keys=["state"], out_keys=["stacked"]),
    "ObservationNorm": lambda: ObservationNorm(1.0, 2.0, in_keys=["state"], out_keys=["scaled"]),
    "VecNormV2": lambda: VecNormV2(in_keys=["state"], out_keys=["scaled"]),
    "UnsqueezeTransform": lambda: UnsqueezeTransform(-1, in_keys=["state"], out_keys=["column"]),
    "RewardScaling": lambda: RewardScaling(1.0, 2.0),
    "RewardClipping": lambda: RewardClipping(-0.1, 0.1),
    "RewardSum": lambda: RewardSum(in_keys=["reward"], out_keys=["episode_reward"]),
    "InitTracker": InitTracker,
    "DoubleToFloat": DoubleToFloat,
    "ActionScaling": ActionScaling,
    "ActionDiscretizer": lambda: ActionDiscretizer(5, categorical=True),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_leave_the_steps_of_an_imagined_environment_as_they_are(imagined, name):
    env = imagined().append_transform(TRANSFORMS[name]())
    check_env_specs(env)
    torch.manual_seed(1)
    data = env.rollout(9, break_when_any_done=False)
    assert data.batch_size == (12, 9)
    assert data["next", "done"].any()
    ended = data["next", "done"][:, :-1, 0]
    follows = data["state"][:, 1:] == data["next", "state"][:, :-1]
    assert follows.all(-1)[~ended].all()  # what they add leaves the steps as they are


@pytest.mark.parametrize("make", [lambda: RewardScaling(0.0, 2.0), lambda: RewardClipping(-9, 9)])
def test_torchrls_planner_plans_in_an_imagined_environment_that_is_transformed(make):
    """Beyond 0.8 lies a treasure, which the dead cannot take; ends do not confuse the plan."""

    def treasure(state, context, action):
        return 5.0 * (state > 0.8)[..., 0].float() - action[..., 0] ** 2

    moves = []
    for term in (None, lambda after: (after > 0.8).float()):
        predictor = make_point(term, rew_func=treasure)
        env = TransformedEnv(PredictorEnv(predictor), make())
        sizes = {"planning_horizon": 3, "optim_steps": 10, "num_candidates": 100, "top_k": 10}
        with torch.no_grad():
            td = CEMPlanner(env, **sizes)(starts(2))
        moves.append(td["action"])
    reached, dead = moves
    assert (reached > 0.5).all()
    assert (dead.abs() < 0.15).all()


def make_imagined():
    """One instance of a known world, in which nothing ends."""
    env = PredictorEnv(make_point(), initial_states=starts, batch_size=[2])
    return TransformedEnv(env, StepCounter(3))


def starts(n):
    return make_point().encode(TensorDict({"observation": torch.rand(n, 2)}, [n]))


@pytest.mark.parametrize(
    "kind",
    [SerialEnv, pytest.param(ParallelEnv, marks=pytest.mark.slow)],
    ids=["serial", "parallel"],
)
def test_several_imagined_environments_step_side_by_side(kind):
    env = kind(2, make_imagined)
    data = env.rollout(7, break_when_any_done=False)
    assert data.batch_size == (2, 2, 7)
    assert data["next", "done"][..., 2, 0].all()
    moved = data["next", "state"] - data["state"]
    torch.testing.assert_close(moved, 0.5 * data["action"])
    env.close()


@pytest.mark.slow
def test_a_planner_acts_in_environments_of_worker_processes():
    env = ParallelEnv(2, TASK.make)
    planner = planner_level(env.observation_spec_unbatched, env.action_spec_unbatched).planner
    env = TransformedEnv(env, planner.make_tensordict_primer())
    data = env.rollout(6, planner, break_when_any_done=False)
    assert data.batch_size == (2, 6)
    assert data["planner", "warm"][:, 1].all()
    env.close()


EXPLORATION = {
    "EGreedyModule": lambda spec: EGreedyModule(spec, eps_init=1.0, eps_end=1.0),
    "AdditiveGaussianModule": lambda spec: AdditiveGaussianModule(spec, sigma_init=0.5),
    "OrnsteinUhlenbeckProcessModule": lambda spec: OrnsteinUhlenbeckProcessModule(
        spec, eps_init=1.0
    ),
}
POLICIES = {
    "planner": lambda spaces: planner_level(*spaces).planner,
    "planner level": lambda spaces: planner_level(*spaces),
    "model-free level": lambda spaces: model_free_level(*spaces),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", EXPLORATION)
def test_exploration_modules_change_what_a_policy_does(name, policy):
    env = TASK.make()
    acting = POLICIES[policy]((env.observation_spec, env.action_spec))
    noise = EXPLORATION[name](env.action_spec)
    both = TensorDictSequential(acting, noise)
    env = env.append_transform(InitTracker()).append_transform(acting.make_tensordict_primer())
    taken = {}
    for how in (ExplorationType.RANDOM, ExplorationType.DETERMINISTIC):
        for part in (both, acting):
            torch.manual_seed(0)
            env.set_seed(0)
            with set_exploration_type(how), torch.no_grad():
                data = env.rollout(3, part)
            assert env.action_spec.is_in(data["action"])
            taken[how, part] = data["action"][0]
    noisy = [taken[ExplorationType.RANDOM, part] for part in (both, acting)]
    plain = [taken[ExplorationType.DETERMINISTIC, part] for part in (both, acting)]
    assert not torch.equal(*noisy)
    torch.testing.assert_close(*plain)


def test_what_has_ended_starts_over_at_zeros_where_the_environment_is_transformed():
    """As the manual says; without a transform it goes on (``tests/imagination``)."""
    predictor = make_point(lambda after: (after > 0.6).float())
    env = TransformedEnv(PredictorEnv(predictor), RewardScaling(0.0, 1.0))
    act = lambda td: td.set("action", torch.ones(2, 1))  # noqa: E731
    start = predictor.encode(TensorDict({"observation": torch.zeros(2, 2)}, [2]))
    options = {"auto_reset": False, "break_when_any_done": False}
    data = env.rollout(4, act, tensordict=env.reset(start), **options)
    assert data["next", "state"][0, :, 0].tolist() == [0.5, 1.0, 0.5, 1.0]
