"""Which keys of an environment, and which buffers, levels take and which they refuse."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import SMALL_FACTORY, both, collected, model_free_level, planner_level
from torchrl.data import (
    LazyStackStorage,
    LazyTensorStorage,
    ListStorage,
    PrioritizedSampler,
    RandomSampler,
    SliceSampler,
    TensorDictMaxValueWriter,
    TensorDictReplayBuffer,
)
from torchrl.data.replay_buffers.writers import ImmutableDatasetWriter
from torchrl.envs import MultiStepTransform, RenameTransform

from layeredrl_torchrl import PredictorFactory, get_task

OBS, ACTION, PAY = ("agents", "observation"), ("agents", "u"), ("agents", "pay")


RENAMED = {"observation_key": OBS, "action_key": ACTION, "reward_key": PAY}


def renamed_predictor(observation_space, action_space, **keys):
    factory = PredictorFactory(hidden_sizes=(8,), n_models=2, **RENAMED)
    predictor = factory(observation_space, action_space)
    predictor.predictor_loss.set_keys(**keys)
    return predictor


def run(make, rename):
    """What a level does and learns in an environment, and the environment."""
    torch.manual_seed(0)
    env = get_task("InvertedPendulum-v5").make(seed=0)
    if rename:
        names = ["observation", "reward"], [OBS, PAY]
        env.append_transform(RenameTransform(*names, ["action"], [ACTION]))
    options = {"n_initial_random_steps": 10, "env": env}
    if make is model_free_level:
        options |= {"observation_key": OBS} if rename else {}
    else:
        options["predictor_factory"] = renamed_predictor if rename else SMALL_FACTORY
    level, actions = make(**options), []
    for data in collected(env, level, 3):
        actions.append(data[level.action_key])
        level.learn(data)
    return level, torch.cat(actions), env


@both
def test_keys_of_the_environment_can_be_renamed(make):
    (level, actions, _), (renamed, others, _) = run(make, False), run(make, True)
    assert torch.equal(others, actions)
    torch.testing.assert_close(renamed.state_dict(), level.state_dict(), rtol=0, atol=0)
    assert {OBS, ACTION} <= set(renamed.buffer[:].keys(True, True))


def test_keys_that_are_not_the_environments_are_named():
    _, _, env = run(model_free_level, True)
    options = {"env": env, "n_initial_random_steps": 10}
    with pytest.raises(KeyError, match="pass observation_key="):
        model_free_level(**options)
    for keys, message in (
        ({"reward": ("next", "reward")}, "reward has the key .* environment's has"),
        ({"observation": "observation"}, "learns from the observation 'observation'"),
        ({"action": "action"}, "learns from the action 'action'"),
    ):
        with pytest.raises(ValueError, match=message):
            planner_level(predictor_factory=partial(renamed_predictor, **keys), **options)


def buffer(storage=LazyTensorStorage, **options):
    return TensorDictReplayBuffer(storage=storage(9), **options)


@both
@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: TensorDictReplayBuffer(batch_size=16), TypeError, "storage of tensors"),
        (lambda: buffer(ListStorage), TypeError, "storage of tensors"),
        (lambda: buffer(LazyStackStorage), TypeError, "storage of tensors"),
        (lambda: buffer(writer=TensorDictMaxValueWriter()), TypeError, "RoundRobinWriter"),
        (lambda: buffer(writer=ImmutableDatasetWriter()), TypeError, "RoundRobinWriter"),
        (lambda: buffer(transform=MultiStepTransform(3, 0.9)), ValueError, "MultiStepTransform"),
        (lambda: TensorDictReplayBuffer, TypeError, "got the class"),
    ],
)
def test_buffers_that_cannot_be_used_are_refused_at_once(make, build, error, message):
    with pytest.raises(error, match=message):
        make(buffer=build())


def test_samplers_that_would_have_no_effect_are_refused_at_once():
    for sampler in (SliceSampler(slice_len=4), object.__new__(PrioritizedSampler)):
        own = buffer()
        own._sampler = sampler
        with pytest.raises(ValueError, match="use a RandomSampler"):
            model_free_level(buffer=own)

    class Relabels(RandomSampler):
        pass

    with pytest.raises(TypeError, match=r"sample on their own"):
        planner_level(buffer=buffer(sampler=Relabels()))
