"""Buffers, storages and keys of every kind that slices can be drawn from, and those that cannot."""

from __future__ import annotations

import re

import pytest
import torch
from lanes import Lane, assert_slices, expected_slices, fill
from tensordict import NonTensorStack, tensorclass
from torch import multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.data import (
    ImmutableDatasetWriter,
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    ReplayBuffer,
    ReplayBufferEnsemble,
    TensorDictReplayBuffer,
    TensorStorage,
)
from torchrl.envs import ExcludeTransform, ObservationNorm

from layeredrl_torchrl.objectives.slices import TransitionSlices


def filled_with(data, transform=None, **kwargs):
    storage = LazyTensorStorage(20, **kwargs)
    buffer = ReplayBuffer(storage=storage, transform=transform, batch_size=7)
    buffer.extend(data)
    return buffer


def check(slices, lane, first, last):
    """The slices of 5 steps are those of a lane's transitions first, ..., last - 1."""
    expected = expected_slices([(lane, first, last)], 5)
    assert_slices(slices.sample(200, 5), expected, lane.tensordict(0, len(lane)))


@pytest.fixture
def filled():
    """A full ring of 20 with 30 transitions written, all observations equal."""
    lane = Lane(0, [(9, "terminated"), (9, "truncated"), (12, "terminated")], "done")
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(20), batch_size=7)
    fill(buffer, [lane], 30, 6, stacked=False)
    return lane, buffer


def test_the_newest_row_is_known_after_saving_and_loading(filled, tmp_path):
    lane, buffer = filled
    buffer.dumps(tmp_path)
    for load, state in (("loads", tmp_path), ("load_state_dict", buffer.state_dict())):
        loaded = TensorDictReplayBuffer(storage=LazyTensorStorage(20), batch_size=7)
        getattr(loaded, load)(state)
        check(TransitionSlices(loaded), lane, 10, 30)


def test_the_newest_row_is_known_in_a_second_buffer_on_the_same_storage(filled):
    lane, buffer = filled
    view = ReplayBuffer(storage=buffer.storage, batch_size=7)
    check(TransitionSlices(view), lane, 10, 30)
    # and when the first one loads a state in which the ring was not full yet
    earlier = TensorDictReplayBuffer(storage=LazyTensorStorage(20), batch_size=7)
    earlier.extend(lane.tensordict(0, 13))
    buffer.load_state_dict(earlier.state_dict())
    check(TransitionSlices(view), lane, 0, 13)


def test_a_buffer_that_another_process_fills_is_read(filled, tmp_path):
    lane, _ = filled
    storage = LazyMemmapStorage(40, shared_init=True, scratch_dir=tmp_path)
    buffer = ReplayBuffer(storage=storage, batch_size=7, shared=True)
    slices = TransitionSlices(buffer)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=buffer.extend, args=(lane.tensordict(0, 30),))
    process.start()
    process.join()
    assert len(slices) == 30
    check(slices, lane, 0, 30)


@pytest.mark.parametrize("in_one_piece", [True, False])
def test_a_data_set_that_nobody_writes_is_read(in_one_piece, filled):
    lane, _ = filled
    data = lane.tensordict(0, 30)
    if not in_one_piece:
        data = torch.stack([data] * 2, 1)[:, 0]
    assert data["observation"].is_contiguous() is in_one_piece
    storage = TensorStorage(data)
    buffer = ReplayBuffer(storage=storage, writer=ImmutableDatasetWriter(), batch_size=7)
    check(TransitionSlices(buffer), lane, 0, 30)


@pytest.mark.parametrize("ndim", [1, 2])
def test_transforms_are_applied_as_the_buffer_applies_them(make_buffer, ndim):
    lane = Lane(0, [(7, "terminated"), (8, "truncated"), (15, "terminated")], "observation")
    buffer = make_buffer(False, True, 20, ndim=ndim)
    data = lane.tensordict(0, 30)
    # after this, the observations no longer meet; after that, there is nothing to compare
    buffer.append_transform(ObservationNorm(loc=5.0, scale=2.0, in_keys=["observation"]))
    buffer.append_transform(ExcludeTransform(("next", "observation"), "collector"))
    buffer.append_transform(
        lambda rows: rows.set("shape", torch.tensor(rows.shape)[0].expand(rows.shape))
    )
    buffer.extend(data.unsqueeze(0) if ndim == 2 else data)
    rows = TransitionSlices(buffer).sample(100, 4)
    assert rows["observation"].allclose(2 * data["observation"][rows["number"]] + 5)
    assert ("next", "observation") not in rows.keys(True)
    assert "collector" not in rows
    assert (rows["shape"] == 400).all()  # transforms see [B * L] rows, as in buffer.sample
    expected = expected_slices([(lane, 10, 30)], 4)
    for number, valid in zip(rows["number"].tolist(), rows["valid"].tolist(), strict=True):
        assert (number, sum(valid)) == expected[number[0]]


RENAMED = {
    "observation_key": ("observation", ("agent", "position")),
    "done_key": (("next", "done"), ("next", "over")),
    "terminated_key": (("next", "terminated"), ("next", "failed")),
    "trajectory_key": (("collector", "traj_ids"), "run"),
    "valid_key": ("valid", ("mask", "valid")),
}


def test_keys_can_be_renamed():
    lane = Lane(0, [(12, "cut"), (8, "truncated"), (10, "terminated")], "trajectory")
    data = lane.tensordict(10, 30)
    for old, new in [*RENAMED.values(), (("next", "observation"), ("next", "agent", "position"))]:
        if old != "valid":
            data.rename_key_(old, new)
    del data["collector"]
    keys = {name: new for name, (_, new) in RENAMED.items()}
    rows = TransitionSlices(filled_with(data), **keys).sample(100, 4)
    assert "valid" not in rows.keys()
    rows["valid"] = rows["mask", "valid"]
    assert_slices(rows, expected_slices([(lane, 10, 30)], 4), data)
    # trajectory ids can be ignored
    rows = TransitionSlices(filled_with(data), **keys | {"trajectory_key": None}).sample(100, 4)
    assert (rows["run"][:, :1] != rows["run"]).any()


@pytest.mark.parametrize("key", [("next", "done"), ("next", "terminated")])
def test_either_end_ends_a_slice_whatever_its_width(key):
    # Two agents with a flag each: one is enough.
    data = Lane(0, [(12, "goes on")], "done").tensordict(0, 12)
    for name in ("done", "terminated"):
        data["next", name] = torch.zeros(12, 2, 1, dtype=torch.bool)
    data[key][5, 1] = True
    rows = TransitionSlices(filled_with(data)).sample(100, 4)
    last = torch.where(rows["number"][:, 0] <= 5, 5, 11)
    expected = rows["number"][:, :1] + torch.arange(4)
    assert torch.equal(rows["number"], torch.minimum(expected, last.unsqueeze(1)))
    assert torch.equal(rows["valid"], expected <= last.unsqueeze(1))


@pytest.mark.parametrize(
    ("key", "shape"),
    [(("collector", "mask"), (12,)), (("collector", "mask"), (12, 1)), ("mask", (12,))],
)
def test_padding_neither_starts_nor_continues_a_slice(key, shape):
    data = Lane(0, [(12, "goes on")], "done").tensordict(0, 12)
    data[key] = (torch.arange(12) % 6 < 4).reshape(shape)
    rows = TransitionSlices(filled_with(data)).sample(200, 3)
    first = rows["number"][:, :1]
    assert set(first.flatten().tolist()) == {0, 1, 2, 3, 6, 7, 8, 9}
    steps = first + torch.arange(3)
    last = torch.where(first < 4, 3, 9)
    assert torch.equal(rows["number"], torch.minimum(steps, last))
    assert torch.equal(rows["valid"], steps <= last)


def test_padding_is_read_under_the_name_that_is_given_or_not_at_all():
    real = torch.arange(12) % 6 < 4
    data = Lane(0, [(12, "goes on")], "done").tensordict(0, 12).set(("agent", "real"), real)
    rows = TransitionSlices(filled_with(data), mask_key=("agent", "real")).sample(200, 1)
    assert set(rows["number"].flatten().tolist()) == {0, 1, 2, 3, 6, 7, 8, 9}
    data["collector", "mask"] = real
    rows = TransitionSlices(filled_with(data), mask_key=None).sample(200, 1)
    assert len(rows["number"].unique()) == 12


@pytest.mark.parametrize("other", [torch.zeros(12), torch.zeros(12, 2).bool()])
def test_another_entry_of_that_name_masks_nothing(other):
    data = Lane(0, [(12, "goes on")], "done").tensordict(0, 12).set("mask", other)
    rows = TransitionSlices(filled_with(data)).sample(200, 1)
    assert len(rows["number"].unique()) == 12


def test_transitions_that_say_that_they_are_single_steps_are_taken():
    data = Lane(0, [(12, "goes on")], "done").tensordict(0, 12)
    data["steps_to_next_obs"] = torch.ones(12, 1, dtype=torch.long)
    assert len(TransitionSlices(filled_with(data)).sample(200, 1)["number"].unique()) == 12


def test_images_and_entries_that_are_no_tensors_are_sliced():
    data = Lane(0, [(4, "terminated"), (6, "truncated")], "observation").tensordict(0, 10)
    data["observation"] = data["number"].view(10, 1, 1, 1).expand(10, 3, 4, 4).byte()
    data["next", "observation"] = data["observation"] + 1
    data["next", "observation"][6, 2, 3, 3] = 99  # one other pixel makes it another state
    data["instruction"] = NonTensorStack(*map(str, range(10)))
    rows = TransitionSlices(filled_with(data)).sample(100, 3)
    assert rows["observation"].shape == (100, 3, 3, 4, 4)
    for numbers, valid, said in zip(
        rows["number"].tolist(), rows["valid"].tolist(), rows["instruction"], strict=True
    ):
        last = min(end for end in (3, 6, 9) if end >= numbers[0])
        assert numbers == [min(numbers[0] + i, last) for i in range(3)]
        assert valid == [numbers[0] + i <= last for i in range(3)]
        assert list(said) == list(map(str, numbers))


@pytest.mark.parametrize("layout", ["[T]", "[E, T]", "[E, T], lanes last in memory"])
def test_only_the_sampled_rows_are_touched(make_buffer, layout):
    """Of what is as long as the buffer, there are views, and rows are selected from it."""
    n = 3000  # of the 5000 that there is place for
    lanes = [Lane(e, [(n, "truncated")], "observation") for e in range(2)]
    data = torch.stack([lane.tensordict(0, n) for lane in lanes])
    if "last" in layout:
        data = data.apply(lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0))
    buffer = make_buffer(False, True, 10_000, ndim=1 if layout == "[T]" else 2)
    buffer.extend(data.view(-1) if layout == "[T]" else data)
    slices = TransitionSlices(buffer)
    touched = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = [t for t in (*args, out) if isinstance(t, torch.Tensor)]
            if max((t.numel() for t in tensors), default=0) >= n:
                touched.append(func)
            return out

    with Watch():
        slices.sample(4, 3)
    names = {func.overloadpacket.__name__ for func in touched}
    assert "index_select" in names  # the watch sees what happens
    assert names <= {"index_select", "index", "view", "alias"}, names
    expected = expected_slices([(lane, 0, n) for lane in lanes], 3)
    assert_slices(slices.sample(64, 3), expected, data.to_tensordict().reshape(-1))


def ten():
    return Lane(0, [(4, "terminated"), (6, "truncated")], "observation").tensordict(0, 10)


READ = ["observation", ("next", "observation"), ("next", "done"), ("next", "terminated")]


def without(key):
    return lambda: filled_with(ten().exclude(key))


@tensorclass
class Step:
    observation: torch.Tensor


@pytest.mark.parametrize(
    ("buffer", "error", "told"),
    [
        (ten, TypeError, "TensorDict.*ReplayBuffer"),
        (lambda: ReplayBuffer(storage=ListStorage(5)), TypeError, "ListStorage.*LazyTensorStorage"),
        (
            lambda: ReplayBufferEnsemble(filled_with(ten()), filled_with(ten())),
            TypeError,
            "StorageEnsemble.*one of its buffers",
        ),
        (
            lambda: ReplayBuffer(storage=TensorStorage(ten().view(5, 2), ndim=2)),
            ValueError,
            "TensorStorage.*ndim=2.*LazyTensorStorage",
        ),
        (lambda: filled_with(torch.zeros(10, 3)), TypeError, "Tensor.*TensorDict"),
        (
            lambda: filled_with(Step(observation=torch.zeros(10, 3), batch_size=[10])),
            TypeError,
            "Step.*TensorDict",
        ),
        (lambda: ReplayBuffer(storage=LazyTensorStorage(5)), ValueError, "empty.*extend"),
        (lambda: filled_with(ten()[:3]), ValueError, "3 rows.*length=4"),
        (lambda: filled_with(ten()[:6].view(3, 2).clone(), ndim=2), ValueError, "2 rows.*length=4"),
        (lambda: filled_with(ten(), lambda rows: rows[::2]), ValueError, r"\[32\].*\[16\]"),
        (lambda: filled_with(ten().view(5, 2)), ValueError, r"\[2\].*ndim=1.*ndim=2"),
        *((without(key), KeyError, rf"{re.escape(repr(key))}.*Available:.*number") for key in READ),
        (without(("next", "observation")), KeyError, "compact_obs=True leave it out"),
        (
            lambda: filled_with(ten().set(("next", "terminated"), torch.rand(10, 1))),
            ValueError,
            r"\('next', 'terminated'\).*float32.*torch\.bool",
        ),
        (
            lambda: filled_with(ten().set(("next", "done"), torch.zeros(10, 1).int())),
            ValueError,
            r"\('next', 'done'\).*int32.*torch\.bool",
        ),
        (
            lambda: filled_with(ten().set(("collector", "mask"), torch.ones(10))),
            ValueError,
            r"\('collector', 'mask'\) is torch.float32.*torch\.bool",
        ),
        (
            lambda: filled_with(ten().set("valid", torch.zeros(10))),
            ValueError,
            "'valid'.*valid_key",
        ),
    ],
)
def test_buffers_that_cannot_be_sliced_are_refused(buffer, error, told):
    buffer = buffer()
    with pytest.raises(error, match=f"(?s){told}"):
        TransitionSlices(buffer).sample(8, 4)


@pytest.mark.parametrize(
    ("counts", "error", "told"),
    [
        ((0, 3), ValueError, "batch_size.*0"),
        ((3, -1), ValueError, "length.*-1"),
        ((3, 2.0), TypeError, r"length.*2\.0"),
    ],
)
def test_counts_that_make_no_sense_are_refused(counts, error, told):
    with pytest.raises(error, match=told):
        TransitionSlices(filled_with(ten())).sample(*counts)
