"""Levels that go on after saving, and their copies."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from helpers import ACTIONS, OBS, SPACES, both, make_transitions, model_free_level, planner_level
from torchrl.checkpoint import Checkpoint, GlobalRNGState
from torchrl.data import LazyTensorStorage, OneHot, TensorDictReplayBuffer

from layeredrl_torchrl import DQNLearner, SafeCheckpoint
from layeredrl_torchrl.levels import LevelHook

LEARNERS = {
    "planner": (planner_level, ACTIONS, (20,), {}),
    "planner of two": (planner_level, ACTIONS, (2, 10), {}),
    "SAC": (model_free_level, ACTIONS, (20,), {}),
    "DQN": (
        model_free_level,
        OneHot(3),
        (20,),
        {"learner_factory": partial(DQNLearner, hidden_sizes=(8,))},
    ),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, name):
    make, spec, shape, options = LEARNERS[name]
    batches = [make_transitions(20, episode_length=10).reshape(shape) for _ in range(4)]
    for data in batches:
        data["action"] = spec.rand(shape)

    def start():
        storage = LazyTensorStorage(60, ndim=len(shape))  # as env= would have it
        given = {"buffer": TensorDictReplayBuffer(storage=storage), "n_initial_random_steps": 15}
        level = make(OBS, spec, **given, updates_per_step=0.33, **options)
        parts = {"level": level, "optim": level.optim, "buffer": level.buffer}
        return level, Checkpoint(**parts, rng=GlobalRNGState())

    level, checkpoint = start()
    for data in batches[:2]:
        level.learn(data)
    checkpoint.save(tmp_path / "checkpoint")
    expected = [level.learn(data) for data in batches[2:]]
    torch.manual_seed(9)
    resumed, checkpoint = start()
    checkpoint.load(tmp_path / "checkpoint")
    assert [resumed.learn(data) for data in batches[2:]] == expected
    assert [info["n_updates"] for info in expected] == [6, 7]
    torch.testing.assert_close(resumed.state_dict(), level.state_dict(), rtol=0, atol=0)


def saved_by_hook(level, path):
    torch.save(LevelHook(level).state_dict(), path)


def loaded_by_hook(level, path):
    LevelHook(level).load_state_dict(torch.load(path, weights_only=False))


def as_parts(level):
    return {"level": level, "optim": level.optim, "buffer": level.buffer}


@pytest.mark.parametrize("shape", [(2, 10), (2, 2, 5)])
@pytest.mark.parametrize(
    ("save", "load"),
    [
        (saved_by_hook, loaded_by_hook),
        *(
            (
                lambda level, path, kind=kind: kind(**as_parts(level)).save(path),
                lambda level, path, kind=kind: kind(**as_parts(level)).load(path),
            )
            for kind in (Checkpoint, SafeCheckpoint)
        ),
    ],
    ids=["hook", "Checkpoint", "SafeCheckpoint"],
)
def test_built_from_spaces_it_goes_on_with_the_axes_that_it_loads(tmp_path, save, load, shape):
    batches = [make_transitions(20, episode_length=10).reshape(shape) for _ in range(5)]
    level, resumed = (planner_level(*SPACES, buffer_size=59) for _ in range(2))
    for data in batches[:2]:
        level.learn(data)
    save(level, tmp_path / "saved")
    load(resumed, tmp_path / "saved")
    infos = []
    for one in (level, resumed):  # 59 is rounded up to 60
        torch.manual_seed(3)
        infos.append([one.learn(data) for data in batches[2:]])  # beyond the end of the ring
    assert infos[0] == infos[1]
    assert infos[0][-1]["n_updates"] == 2
    assert resumed.buffer.storage.shape == level.buffer.storage.shape
    torch.testing.assert_close(resumed.state_dict(), level.state_dict(), rtol=0, atol=0)
    for stored in (level.buffer.storage[:], resumed.buffer.storage[:]):
        assert len(stored.reshape(-1)) == 60
    torch.testing.assert_close(
        resumed.buffer.storage[:].to_dict(), level.buffer.storage[:].to_dict(), rtol=0, atol=0
    )


@both
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_do_not_learn(make, duplicate):
    level = make(*SPACES)
    level.learn(make_transitions())
    other = duplicate(level)
    with pytest.raises(RuntimeError, match="is a copy for acting"):
        other.learn(make_transitions())
    if make is planner_level:
        other.buffer = level.buffer
        assert other.learn(make_transitions())["n_updates"] == 6
    else:
        assert other.optim is None
