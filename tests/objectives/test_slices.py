"""Slices of replay buffers against lists of the episodes that were written, kept on the side."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from lanes import (
    Lane,
    assert_slices,
    assert_unchanged,
    expected_slices,
    fill,
    snapshot,
    still_stored,
)
from torchrl.collectors import Collector
from torchrl.envs import GymEnv, SerialEnv

from layeredrl_torchrl.objectives.slices import TransitionSlices


def several_episodes(min_lanes, max_lanes):
    ends = st.sampled_from(["terminated", "truncated", "cut"])
    episodes = st.lists(st.tuples(st.integers(1, 7), ends), min_size=1, max_size=8)
    return st.lists(episodes, min_size=min_lanes, max_size=max_lanes)


# An episode that is cut (a resumed run) is told by its observations or its id alone.
LAYOUTS = [
    ("[T]", "observation"),
    ("[T]", "episode"),
    ("[T]", "trajectory"),
    ("[T]", "done"),
    ("[E, T]", "observation"),
    ("[E, T]", "trajectory"),
    ("[E, T]", "done"),
    ("[E, T] flattened", "observation"),
    ("[E, T] flattened", "trajectory"),
]


@pytest.mark.parametrize(("layout", "witness"), LAYOUTS)
@settings(max_examples=30, deadline=None)
@given(
    episodes=several_episodes(1, 3),
    memmap=st.booleans(),
    with_index=st.booleans(),
    length=st.integers(1, 6),
    spare=st.integers(-15, 4),  # a negative spare wraps the ring
    chunk=st.integers(1, 9),
    seed=st.integers(0, 2**16),
)
@example(  # episodes told apart by done and by nothing but the observation, in one batch
    episodes=[[(4, "terminated"), (3, "cut"), (4, "truncated")]],
    memmap=False,
    with_index=False,
    length=4,
    spare=0,
    chunk=5,
    seed=0,
)
def test_slices_follow_the_episodes_that_were_written(
    make_buffer, layout, witness, episodes, memmap, with_index, length, spare, chunk, seed
):
    if witness == "done":
        episodes = [[(n, end.replace("cut", "truncated")) for n, end in lane] for lane in episodes]
    if layout == "[T]":
        episodes = episodes[:1]
    lanes = [Lane(e, several, witness) for e, several in enumerate(episodes)]
    n_rows, stacked = min(map(len, lanes)), layout == "[E, T]"
    along_time = n_rows if stacked else n_rows * len(lanes)
    assume(along_time >= length)
    capacity = max(along_time + spare, length, chunk if stacked else chunk * len(lanes))
    # TensorDictReplayBuffer refuses batches of a single row [E, 1]
    with_index &= not stacked or (chunk > 1 and n_rows % chunk != 1)
    size = capacity * len(lanes) if stacked else capacity
    buffer = make_buffer(memmap, with_index, size, ndim=2 if stacked else 1)
    slices = TransitionSlices(buffer)
    assert len(slices) == 0

    runs = fill(buffer, lanes, n_rows, chunk, stacked)
    if stacked or len(lanes) == 1:
        runs = [(lane, max(0, n_rows - capacity), n_rows) for lane in lanes]
    else:
        runs = still_stored(runs, capacity)
    before = snapshot(buffer)
    rng = torch.get_rng_state()
    rows, again = (slices.sample(64, length, torch.Generator().manual_seed(seed)) for _ in range(2))

    assert torch.equal(torch.get_rng_state(), rng)
    assert (rows == again).all()
    assert len(slices) == sum(last - first for _, first, last in runs)
    expected = expected_slices(runs, length)
    assert_slices(rows, expected, torch.cat([lane.tensordict(0, n_rows) for lane in lanes]))
    rows.zero_()  # what was sampled is a copy
    assert_unchanged(buffer, before)


def assert_uniform(counts):
    """No chi-square statistic this high in a million draws of uniform counts."""
    n_bins = counts.numel()
    mean = counts.sum() / n_bins
    statistic = float(((counts - mean) ** 2 / mean).sum())
    assert statistic < n_bins - 1 + 5 * math.sqrt(2 * (n_bins - 1)), counts


@pytest.mark.parametrize("ndim", [1, 2])
def test_every_stored_transition_starts_equally_many_slices(make_buffer, ndim):
    # One long episode and many short ones, in a ring that was written one and a half times.
    episodes = [(3, "terminated")] * 50 + [(90, "truncated")] + [(1, "terminated")] * 10
    lanes = [Lane(e, episodes[e:], "observation") for e in range(ndim)]
    n_rows = min(map(len, lanes))
    buffer = make_buffer(False, False, 160 * ndim, ndim=ndim)
    fill(buffer, lanes, n_rows, 40, stacked=ndim == 2)
    rows = TransitionSlices(buffer).sample(160 * ndim * 100, 2)

    stored = torch.cat([lane.tensordict(n_rows - 160, n_rows)["number"] for lane in lanes])
    starts = rows["number"][:, 0]
    assert set(starts.tolist()) == set(stored.tolist())
    assert_uniform((starts.unsqueeze(1) == stored).sum(0).double())
    # Terminal transitions are reached from before as well.
    assert (rows["next", "terminated"].squeeze(-1) & rows["valid"])[:, 1].any()


@pytest.mark.parametrize("layout", ["[T]", "[E, T]", "[E, T] flattened"])
def test_slices_of_a_collector_on_mujoco_follow_its_episodes(make_buffer, layout):
    # Random actions drop the pendulum within a few steps, so most slices meet an episode's end.
    make = partial(GymEnv, "InvertedPendulum-v5", device="cpu")
    env = make() if layout == "[T]" else SerialEnv(2, make)
    env.set_seed(0)
    collector = Collector(env, None, frames_per_batch=64, total_frames=320)
    buffer = make_buffer(layout == "[E, T]", True, 200, ndim=2 if layout == "[E, T]" else 1)
    batches = []
    for i, batch in enumerate(collector):
        numbers = 1000 * i + torch.arange(batch.numel()).view(batch.shape)
        batches.append(batch.clone().set("number", numbers))
        buffer.extend(batches[-1].reshape(-1) if "flattened" in layout else batches[-1])
    collector.shutdown()
    following = {}
    # a step follows another within a batch only, where batches lie one after the other
    for piece in batches if "flattened" in layout else [torch.cat(batches, -1)]:
        for lane in piece.reshape(-1, piece.shape[-1]):
            numbers, done = lane["number"].tolist(), lane["next", "done"].flatten().tolist()
            for number, after, end in zip(numbers, numbers[1:], done, strict=False):
                if not end:
                    following[number] = after
    expected = {}
    for number in torch.cat([batch["number"].flatten() for batch in batches]).tolist():
        numbers = [number]
        while len(numbers) < 6 and numbers[-1] in following:
            numbers.append(following[numbers[-1]])
        expected[number] = (numbers + numbers[-1:] * (6 - len(numbers)), len(numbers))

    rows = TransitionSlices(buffer).sample(512, 6)

    assert len(buffer) == 200
    assert_slices(rows, expected, torch.cat([batch.reshape(-1) for batch in batches]))
    n_ended = (~rows["valid"][:, -1]).sum()
    assert 100 < n_ended < 500  # the check above saw both kinds
    assert (rows["next", "terminated"].squeeze(-1) & rows["valid"]).any()
