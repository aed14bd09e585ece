"""Buffers in checkpoints: what they hold, write next and cannot save."""

from __future__ import annotations

import math
import os

import pytest
import torch
from buffer_parts import make_buffer, steps
from tensordict import TensorDict
from torchrl.checkpoint import CheckpointError
from torchrl.data import (
    CompressedListStorage,
    LazyTensorStorage,
    ListStorage,
    ReplayBuffer,
    TensorDictMaxValueWriter,
    TensorDictReplayBuffer,
)
from torchrl.data.replay_buffers.checkpointers import TensorStorageCheckpointer
from torchrl.envs import ObservationNorm

from layeredrl_torchrl import SafeCheckpoint


@pytest.mark.parametrize("n", [0, 1, 2, 3])
@pytest.mark.parametrize("batch", [(), (4,)])
def test_buffers_go_on_as_they_were(n, batch, tmp_path):
    """Empty, partly filled, full and overwritten; also with an axis of environments."""
    one, other = (make_buffer(40, 1 + len(batch)) for _ in range(2))
    for _ in range(n):
        one.extend(steps(20 // (1 + len(batch) * 3), *batch))
    other.extend(steps(3, *batch))
    path = SafeCheckpoint(buffer=one).save(tmp_path / "checkpoint")
    SafeCheckpoint(buffer=other).load(path)
    for _ in range(4):
        assert len(one) == len(other)
        if len(one):
            assert (one[:] == other[:]).all()
        new = steps(3, *batch)
        one.extend(new)
        other.extend(new.clone())


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize(("saved", "room"), [(6, 9), (13, 12), (8, 8), (5, 7)])
def test_a_buffer_may_have_another_size_when_it_goes_on(saved, room, batch, tmp_path):
    """Saved with room for 8 steps: what is written then follows what was written last."""

    def make(steps):
        n = steps * math.prod(batch)
        return TensorDictReplayBuffer(storage=LazyTensorStorage(n, ndim=1 + len(batch)))

    def write(buffer, *steps):
        shape = (*batch, len(steps))
        buffer.extend(TensorDict({"x": torch.tensor(steps).expand(shape).clone()}, shape))

    buffer, other = make(8), make(room)
    write(buffer, *range(saved // 2))
    write(buffer, *range(saved // 2, saved))
    SafeCheckpoint(buffer=other).load(SafeCheckpoint(buffer=buffer).save(tmp_path / "checkpoint"))
    write(other, 100, 101)
    held = sorted(set(other[:]["x"].flatten().tolist()))
    expected = [*range(max(saved - 8, 0), saved), 100, 101][-room:]
    assert held == expected


def test_buffers_take_the_room_that_they_fill(tmp_path):
    small, large = (make_buffer(size) for size in (40, 100_000))
    sizes = []
    for buffer in (small, large):
        buffer.extend(steps(30))
        path = SafeCheckpoint(buffer=buffer).save(tmp_path / "new" / "folders" / f"{len(sizes)}")
        assert type(buffer.storage.checkpointer) is TensorStorageCheckpointer  # as it was
        sizes.append(sum(p.stat().st_size for p in path.rglob("*.memmap")))
    assert sizes[0] == sizes[1] < 1000
    tiny = make_buffer(10)
    tiny.extend(steps(10))
    with pytest.raises(CheckpointError, match="room for 10 rows, saved were 30"):
        SafeCheckpoint(buffer=tiny).load(path)


def test_transforms_keep_their_state(tmp_path):
    """The scale of a buffer's transform is saved without TorchRL's pickle, and undone in part."""

    def build(loc, scale):
        norm = ObservationNorm(loc=loc, scale=scale, in_keys=["obs"], standard_normal=True)
        return make_buffer(transform=norm)

    one, other = build(5.0, 2.0), build(0.0, 1.0)
    one.extend(steps(20))
    assert torch.equal(one[:]["obs"], (one.storage[:]["obs"] - 5.0) / 2.0)
    path = SafeCheckpoint(buffer=one, z_net=torch.nn.Linear(2, 1)).save(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="component 'z_net'"):
        SafeCheckpoint(buffer=other, z_net=torch.nn.Linear(3, 1)).load(path)
    other.extend(steps(20))
    assert torch.equal(other[:]["obs"], other.storage[:]["obs"])
    SafeCheckpoint(buffer=other).load(path, components=["buffer"])
    assert torch.equal(other[:]["obs"], one[:]["obs"])


@pytest.mark.parametrize("storage", [ListStorage, CompressedListStorage])
def test_buffers_that_need_a_pickle_are_refused(storage, tmp_path):
    buffer = TensorDictReplayBuffer(storage=storage(40))
    buffer.extend(steps(3))
    with pytest.raises(CheckpointError, match="use LazyTensorStorage"):
        SafeCheckpoint(buffer=buffer).save(tmp_path / "checkpoint")
    ahead = make_buffer(prefetch=2, batch_size=4)
    with pytest.raises(CheckpointError, match="without prefetch="):
        SafeCheckpoint(buffer=ahead).save(tmp_path / "checkpoint")
    assert not os.listdir(tmp_path)


def test_buffers_without_tensordicts_are_refused(tmp_path):
    """TorchRL cannot load them into an empty buffer."""
    for data in (torch.ones(3, 2), (torch.ones(3, 2), torch.zeros(3))):
        buffer = ReplayBuffer(storage=LazyTensorStorage(40))
        buffer.extend(data)
        with pytest.raises(CheckpointError, match="store TensorDicts"):
            SafeCheckpoint(buffer=buffer).save(tmp_path / "checkpoint")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("n", [0, 3, 12])
@pytest.mark.parametrize("held", [0, 5])
def test_a_buffer_of_the_largest_values_goes_on(n, held, tmp_path):
    """Its writer has no ``state_dict``. What it keeps then are the eight largest of all."""

    def make(rows):
        writer = TensorDictMaxValueWriter(rank_key="value")
        buffer = make_buffer(8, writer=writer)
        if rows:
            buffer.extend(TensorDict({"value": torch.randn(rows)}, [rows]))
        return buffer

    one, other = make(n), make(held)
    path = SafeCheckpoint(buffer=one).save(tmp_path / "checkpoint")
    before = other[:]["value"].tolist() if held else []
    parts = {"buffer": other, "z_net": torch.nn.Linear(2, 1)}
    full = SafeCheckpoint(buffer=one, z_net=torch.nn.Linear(3, 1)).save(tmp_path / "other")
    with pytest.raises(CheckpointError, match="component 'z_net'"):
        SafeCheckpoint(**parts).load(full)
    assert (other[:]["value"].tolist() if len(other) else []) == before
    SafeCheckpoint(buffer=other).load(path)
    for new in torch.randn(4, 3):
        kept = torch.cat((one[:]["value"], new)) if len(one) else new
        one.extend(TensorDict({"value": new}, [3]))
        other.extend(TensorDict({"value": new}, [3]))
        largest = kept.sort().values[-8:]
        for buffer in (one, other):
            assert torch.equal(buffer[:]["value"].sort().values, largest)
