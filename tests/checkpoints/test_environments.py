"""Environments that go on from a saved state: against the same one left alone, bit for bit."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.envs import GymEnv, GymWrapper, PendulumEnv, RewardSum, SerialEnv, StepCounter

from layeredrl_torchrl import (
    CollectorState,
    SafeCheckpoint,
    SuccessRate,
    get_task,
    make_batched,
)
from layeredrl_torchrl.checkpoints import EnvState
from layeredrl_torchrl.checkpoints._objects import load, save


def make_env(name, seed):
    """Episodes of 13 steps at most, so that resets draw from the environments' generators."""
    if name == "serial":
        env = SerialEnv(2, partial(GymEnv, "Hopper-v5"))
    elif name == "gym":
        makers = [partial(gym.make, "Pendulum-v1", max_episode_steps=13)] * 2
        env = GymWrapper(gym.vector.SyncVectorEnv(makers, autoreset_mode="Disabled"))
    else:
        env = make_batched(name, 2)
    env = env.append_transform(StepCounter(13)) if name != "gym" else env
    if "Maze" in name:
        env.append_transform(SuccessRate(window=3))
    env = env.append_transform(RewardSum())
    env.set_seed(seed)
    return env


@pytest.mark.parametrize(
    "name",
    [
        "InvertedPendulum-v5",
        "Ant-v5",
        "Reacher-v5",
        "CartPoleSwingUp",
        "PointMaze-U",
        "serial",
        "gym",
    ],
)
def test_a_resumed_collector_goes_on_as_if_it_had_not_stopped(name, tmp_path):
    """Through a checkpoint on the disk, amid episodes, into environments with other seeds."""
    if "Maze" in name:
        pytest.importorskip("gymnasium_robotics")
    options = {"frames_per_batch": 34, "total_frames": 34 * 5}
    torch.manual_seed(1)
    alone = Collector(make_env(name, 0), **options)
    batches = iter(alone)
    first = [next(batches) for _ in range(2)]
    assert not first[-1]["next", "done"][:, -1].all()
    path = SafeCheckpoint(collector=CollectorState(alone)).save(tmp_path / "checkpoint")
    drawn = torch.get_rng_state()
    expected = list(batches)

    torch.manual_seed(9)
    resumed = Collector(make_env(name, 77), **options)
    SafeCheckpoint(collector=CollectorState(resumed)).load(path)
    torch.set_rng_state(drawn)
    found = list(resumed)
    assert len(found) == len(expected) == 3
    for a, b in zip(expected, found, strict=True):
        assert set(a.keys(True, True)) == set(b.keys(True, True))
        for key in a.keys(True, True):
            assert torch.equal(a[key], b[key]), key
    ids = torch.cat([data["collector", "traj_ids"] for data in first + found], 1)
    dones = torch.cat([data["next", "done"] for data in first + found], 1)
    assert dones.any()
    assert len(ids.unique()) == 2 + int(dones[:, :-1].sum())
    for collector in (alone, resumed):
        collector.shutdown()


class Windy(gym.Wrapper):
    """A wrapper with a state of its own: numbers, arrays, a generator and nested lists."""

    def __init__(self, env):
        super().__init__(env)
        self.wind = np.random.default_rng(3)
        self.past = []
        self.place = env.unwrapped.data.qpos  # the simulator's memory
        self.mean = {"n": 0, "sum": np.zeros(1)}

    def step(self, action):
        gust = self.wind.normal()
        self.past = [*self.past, (gust, len(self.past))][-4:]
        self.mean["n"] += 1
        self.mean["sum"] = self.mean["sum"] + gust
        obs, reward, *ends = self.env.step(np.clip(action + sum(g for g, _ in self.past), -1, 1))
        reward += float(self.mean["sum"][0]) / self.mean["n"] + float(self.place[0])
        return obs, reward, *ends


def make_windy(seed):
    env = GymWrapper(Windy(get_task("Reacher-v5").make_gym()))
    env.set_seed(seed)
    return env


def test_wrappers_keep_what_they_hold(tmp_path):
    env, twin = make_windy(0), make_windy(5)
    data = env.rollout(7)[-1]["next"]
    path = SafeCheckpoint(env=EnvState(env)).save(tmp_path / "checkpoint")
    twin.reset()
    SafeCheckpoint(env=EnvState(twin)).load(path)
    for _ in range(60):  # over the end of an episode
        action = env.action_spec.rand()
        steps = [e.step(data.clone().set("action", action))["next"] for e in (env, twin)]
        assert all(torch.equal(steps[0][key], steps[1][key]) for key in steps[0].keys())
        data = steps[0]
        if data["done"]:
            resets = [e.reset() for e in (env, twin)]
            assert torch.equal(resets[0]["observation"], resets[1]["observation"])
            data = resets[0]


@dataclass
class Odd:
    """Holds one of each kind of value."""

    held: object


KINDS = {
    "flags": [True, False, None],
    "numbers": [3, -2.5, "text", math.inf],
    "scalars": [np.float32(0.1), np.int8(-3), np.bool_(True)],
    "arrays": [np.arange(6, dtype=np.int16).reshape(2, 3), np.zeros((0, 2)), np.array(1.5)],
    "tuples": (1, (2.0, [3, (4,)]), ()),
    "keys": {1: "a", "1": {(2, "b"): [None]}, None: 0},
    "generators": [np.random.Generator(kind(7)) for kind in (np.random.MT19937, np.random.Philox)],
}


@pytest.mark.parametrize("name", KINDS)
def test_values_of_any_kind_come_back_as_they_were(name):
    """Through JSON, into an object that holds something else."""
    value = KINDS[name]
    state = json.loads(json.dumps(save(Odd(value), "odd", {})))
    for other in (None, [1], {"1": 2}, copy.deepcopy(value)):
        found = load(Odd(other), state, "odd").held
        if name == "generators":
            assert all(isinstance(one, np.random.Generator) for one in found)
            found, value = (
                [copy.deepcopy(one).normal() for one in ones] for ones in (found, KINDS[name])
            )
        assert repr(found) == repr(value)
        assert list(map(type, found)) == list(map(type, value))


class Engine:
    """As a simulator in C: nothing of it can be seen from Python."""

    __slots__ = ("position",)


def test_what_cannot_be_saved_says_so():
    env = make_windy(0)
    env._env.engine = Engine()
    with pytest.raises(
        TypeError, match=r"Windy\.engine cannot be saved.*Engine.*cannot be resumed"
    ):
        EnvState(env)
    with pytest.raises(TypeError, match="PendulumEnv cannot be saved"):
        EnvState(PendulumEnv())
    env = make_batched("InvertedPendulum-v5", 2, seed=0)
    state = EnvState(env).state_dict()
    with pytest.raises(ValueError, match="saved was"):
        EnvState(make_batched("Reacher-v5", 2)).load_state_dict(state)
    with pytest.raises(ValueError, match="parts"):
        EnvState(make_env("serial", 0)).load_state_dict(state)


def test_environments_that_have_not_started_yet():
    fresh = EnvState(SerialEnv(2, partial(GymEnv, "Hopper-v5")))
    assert len(fresh.state_dict()["parts"]) == 2


def test_collectors_with_workers_are_refused():
    with pytest.raises(TypeError, match="MultiSyncCollector: a run of workers"):
        CollectorState(MultiSyncCollector.__new__(MultiSyncCollector))
