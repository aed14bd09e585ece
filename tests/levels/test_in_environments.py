"""A PlannerLevel in TorchRL's collectors and over batched environments."""

from __future__ import annotations

import pytest
import torch
from helpers import collected, planner_level
from torchrl.envs import StepCounter, TensorDictPrimer, TransformedEnv
from torchrl.envs.utils import check_env_specs
from torchrl.modules.utils import get_primers_from_module

from layeredrl_torchrl import TransitionSlices, get_task, make_batched

PENDULUM = "InvertedPendulum-v5"


def make_env(n):
    env = get_task(PENDULUM).make(seed=0) if n is None else make_batched(PENDULUM, n, seed=0)
    return env.append_transform(StepCounter(9))


def run(n, **options):
    """Collect and learn five times; returns the level and all data, ``[*b, T]``."""
    torch.manual_seed(0)
    env = make_env(n)
    options = {"n_initial_random_steps": 40, "random_duration": 3} | options
    level, batches, infos = planner_level(env=env, **options), [], []
    for data in collected(env, level, 5):
        batches.append(data)
        infos.append(level.learn(data))
    return level, torch.cat(batches, -1), infos


def test_torchrl_finds_one_transform_that_carries_all():
    """The planner inside the level has one of its own, which holds a part of this one's."""
    level = planner_level(env=make_env(2))
    found = get_primers_from_module(level)
    assert isinstance(found, TensorDictPrimer)
    assert set(found.primers.keys(True, True)) == {
        level.state_key,
        *level.planner.make_tensordict_primer().primers.keys(True, True),
    }


@pytest.mark.parametrize("n", [None, 2])
def test_it_is_random_first_and_learns_from_what_a_collector_gives(n):
    level, data, infos = run(n)
    assert data.batch_size == ((100,) if n is None else (n, 50))
    assert level.n_env_steps == len(level.buffer) == 100
    # The updates of the random phase are made up for at its end.
    assert [info["n_updates"] for info in infos] == [0, 4, 2, 2, 2]
    random = data["random_action"].flatten()
    time = torch.arange(data.shape[-1]).expand(data.shape).flatten()
    assert torch.equal(random, time < 40 // (n or 1))
    assert make_env(n).action_spec_unbatched.is_in(data["action"])
    assert torch.equal(
        data["next", "planner", "warm"].squeeze(-1), ~data["random_action"].squeeze(-1)
    )
    # What is stored can be cut into slices: time goes on from batch to batch.
    slices = TransitionSlices(level.buffer).sample(200, 5)
    assert slices["valid"].all(1).any()
    follows = slices["valid"][:, 1:]
    reached, started = slices["next", "observation"][:, :-1], slices["observation"][:, 1:]
    assert torch.equal(reached[follows], started[follows])


def test_random_phases_end_with_their_episode():
    """Each instance has its own phases; a reset clears them, and what is carried is in step."""
    _, data, _ = run(3, n_initial_random_steps=0, random_prob=0.15, random_duration=4)
    assert data["next", "done"].any()
    both = 0
    for row in data:
        left, onward = row["random_steps_left"][:, 0], row["next", "random_steps_left"][:, 0]
        # What is carried is 0 until the level acts, and one more than is left from then on.
        assert (onward > 0).all()
        left, onward = (left - 1).clamp_min(0), onward - 1
        random, ended = row["random_action"][:, 0], row["next", "done"][:, 0]
        assert left[0] == 0
        assert torch.equal(left[1:], torch.where(ended[:-1], 0, onward[:-1]))
        assert random[left > 0].all()
        # A phase that begins has all its steps before it.
        assert (onward[random & (left == 0)] == 3).all()
        assert torch.equal(onward[left > 0], left[left > 0] - 1)
        both += int((ended & (onward > 0)).sum())
    assert both  # some phase was cut short
    assert 0.1 < data["random_action"].float().mean() < 0.8


def test_in_a_rollout_its_primer_carries_the_plan():
    env = make_env(2)
    level = planner_level(env=env, random_prob=0.3)
    env = TransformedEnv(env, level.make_tensordict_primer())
    check_env_specs(env)
    data = env.rollout(12, level, break_when_any_done=False)
    assert data.batch_size == (2, 12)
    assert data["planner", "warm"].any()
    assert level.learn(data)["n_updates"] == 2
