"""Environments that go on from a saved state: against the same one left alone, bit for bit."""

from __future__ import annotations

import copy
import enum
import json
import math
import random
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.envs import (
    GymEnv,
    GymWrapper,
    ParallelEnv,
    PendulumEnv,
    RewardSum,
    SerialEnv,
    StepCounter,
)

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


class Phase(enum.Enum):
    """Where a task stands."""

    REACH = "reach"
    GRASP = "grasp"


class Sides(enum.Flag):
    """Several at once."""

    LEFT = 1
    RIGHT = 2


Place = namedtuple("Place", "x y")

KINDS = {
    "flags": [True, False, None],
    "choices": [Phase.GRASP, Sides.LEFT | Sides.RIGHT, Sides(0)],
    "chosen": {Phase.GRASP: 1, Phase.REACH: Phase.GRASP, (Phase.REACH, 1): 2},
    "numbers": [3, -2.5, "text", math.inf, np.float64(0.5), np.str_("text")],
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


def through_json(held, other):
    """``held`` as it comes back in place of ``other``."""
    return load(Odd(other), json.loads(json.dumps(save(Odd(held), "odd", {}))), "odd").held


def test_named_tuples_and_dictionaries_keep_their_class():
    assert through_json([Place(1, 2)], [Place(0, 0)])[0].y == 2
    counts = through_json(defaultdict(int, a=2), defaultdict(int, b=1))
    assert counts == {"a": 2}
    assert counts["new"] == 0
    assert type(through_json(OrderedDict(a=1), OrderedDict())) is OrderedDict


@dataclass(slots=True, frozen=True)
class Slotted:
    """Attributes without a ``__dict__``."""

    place: object


class Secret(Slotted):
    """One more, and one of its own name, beside a ``__dict__``."""

    __slots__ = ("__dict__", "__key")

    def __init__(self, place, key, more):
        super().__init__(place)
        object.__setattr__(self, "_Secret__key", key)
        self.__dict__["more"] = more


def test_attributes_outside_of_the_dictionary_are_saved():
    assert through_json(Slotted([1, None]), Slotted(5)).place == [1, None]
    found = through_json(Secret(Slotted(1), None, 3), Secret(Slotted(0), 1, 2))
    assert (found.place.place, found._Secret__key, found.more) == (1, None, 3)


def test_what_became_none_is_none():
    """As a thing that was taken away."""
    assert through_json([1, None], [1, Odd(3)]) == [1, None]
    assert through_json(Odd(None), Odd(3)).held is None


def sharing():
    """What is held in several places, with views of arrays and a generator that all draw from."""
    rng, rows = np.random.default_rng(5), np.zeros((3, 2))
    rooms = [Odd({"n": i, "rng": rng}) for i in range(3)]
    return {"rng": rng, "rows": rows, "row": rows[1], "back": rows[::-1, 1], "rooms": rooms}


def test_what_is_shared_stays_shared():
    held, other = sharing(), sharing()
    for made, at in ((held, 2), (other, 0)):
        made["at"], made["path"] = made["rooms"][at], [made["rooms"][at]]
    found = through_json(held, other)
    assert found["at"] is found["path"][0] is found["rooms"][2]
    assert [room.held["n"] for room in found["rooms"]] == [0, 1, 2]
    assert all(room.held["rng"] is found["rng"] for room in found["rooms"])
    assert found["rng"].normal() == held["rng"].normal()
    found["rows"][1] = [3, 4]
    assert found["row"].tolist() == [3, 4]
    assert found["back"].tolist() == [0, 4, 0]


def test_what_cannot_be_shared_as_it_was_is_refused():
    """The first room is found where the third was, and would have two states."""
    first, other = ({"at": None} | sharing() for _ in range(2))
    first["at"], other["at"] = first["rooms"][2], other["rooms"][0]
    with pytest.raises(ValueError, match=r"\['rooms'\]\[0\] is an object that was loaded for"):
        through_json(first, other)


def test_parts_of_a_simulators_memory_stay_parts_of_it():
    held, other = (get_task("Reacher-v5").make_gym().unwrapped for _ in range(2))
    for env, seed in ((held, 0), (other, 1)):
        env.reset(seed=seed)
        env.tips = [env.data.qpos[:2], env.data.body("fingertip").xpos]
    load(other, json.loads(json.dumps(save(held, "env", {}))), "env")
    assert [tip.tolist() for tip in other.tips] == [tip.tolist() for tip in held.tips]
    other.data.qpos[:] = 0.5
    assert other.tips[0].tolist() == [0.5, 0.5]


def test_another_function_in_its_place_is_refused():
    """A function cannot be read from a file without running code."""
    assert through_json({len: 2}, {len: 1}) == {len: 2}
    assert through_json(len, len) is len
    with pytest.raises(ValueError, match=r"odd\.held is max, saved was len, which cannot be put"):
        through_json(len, max)
    with pytest.raises(ValueError, match=r"odd\.held has no key len"):
        through_json({len: 2}, {max: 1})


@pytest.mark.parametrize(
    ("held", "name"),
    [
        (torch.zeros(2), "torch.Tensor"),
        (random.Random(0), "random.Random"),
        (type("Queue", (set,), {})([1]), "Queue"),
        (type("Few", (set,), {"__slots__": ()})([1]), "Few"),
        ({Odd(0).__class__.__init__.__code__: 1}, "code"),
    ],
)
def test_what_holds_its_state_in_c_is_refused(held, name):
    """They have a ``__dict__``, too, in which it is not."""
    with pytest.raises(TypeError, match=rf"odd\.held cannot be saved.*{name}"):
        save(Odd(held), "odd", {})


def test_what_cannot_be_saved_says_so():
    env = make_windy(0)
    env._env.engine = memoryview(b"in C")
    with pytest.raises(
        TypeError, match=r"Windy\.engine cannot be saved.*memoryview.*cannot be resumed"
    ):
        EnvState(env)
    with pytest.raises(TypeError, match="PendulumEnv cannot be saved"):
        EnvState(PendulumEnv())
    with pytest.raises(TypeError, match="ParallelEnv cannot be saved: its workers keep it; use"):
        EnvState(ParallelEnv(2, partial(GymEnv, "Pendulum-v1")).append_transform(RewardSum()))
    env = make_batched("InvertedPendulum-v5", 2, seed=0)
    state = EnvState(env).state_dict()
    with pytest.raises(ValueError, match="saved was"):
        EnvState(make_batched("Reacher-v5", 2)).load_state_dict(state)
    with pytest.raises(ValueError, match="parts"):
        EnvState(make_env("serial", 0)).load_state_dict(state)


def test_an_environment_that_has_not_started_has_a_state():
    fresh = EnvState(SerialEnv(2, partial(GymEnv, "Hopper-v5")))
    assert len(fresh.state_dict()["parts"]) == 2


def test_collectors_with_workers_are_refused():
    with pytest.raises(TypeError, match="MultiSyncCollector: a run with workers"):
        CollectorState(MultiSyncCollector.__new__(MultiSyncCollector))
