"""Slices of replay buffers against lists of the episodes that were written, kept on the side."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tensordict import NonTensorStack, TensorDict, tensorclass
from torch import multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.collectors import Collector
from torchrl.data import (
    ImmutableDatasetWriter,
    LazyMemmapStorage,
    LazyTensorStorage,
    ListStorage,
    ReplayBuffer,
    ReplayBufferEnsemble,
    SamplerWithoutReplacement,
    TensorDictMaxValueWriter,
    TensorDictReplayBuffer,
    TensorStorage,
)
from torchrl.envs import ExcludeTransform, GymEnv, ObservationNorm, RewardScaling, SerialEnv

from layeredrl_torchrl.objectives.slices import TransitionSlices


class Lane:
    """One environment's transitions in the order in which they were collected.

    A transition is (number, episode, how the step ended), and is the same in the buffer as here if
    it has the same number. ``witness`` says what tells episodes apart in the buffer: observations
    that change with each step, or with each episode, trajectory ids, or only done.
    """

    def __init__(self, index, episodes, witness):
        self.transitions = []
        for episode, (steps, end) in enumerate(episodes):
            ends = ["goes on"] * (steps - 1) + [end]
            self.transitions += [
                (index * 10_000 + len(self.transitions) + i, episode, ending)
                for i, ending in enumerate(ends)
            ]
        self.index, self.witness = index, witness

    def __len__(self):
        return len(self.transitions)

    def tensordict(self, first, last):
        """Transitions first, ..., last - 1 as a collector gives them, [last - first]."""
        number, episode, ending = zip(*self.transitions[first:last], strict=True)
        number, episode = torch.tensor(number), torch.tensor(episode)
        moves = int(self.witness == "observation")
        state = number + 1000 * episode if moves else episode * (self.witness == "episode")
        ids = {"observation": 0 * episode, "trajectory": 100 * self.index + episode}
        flag = {
            name: torch.tensor([e == name for e in ending]).unsqueeze(1)
            for name in ("terminated", "truncated")
        }
        batch = TensorDict(
            {
                "observation": torch.stack([state, -state], -1).float(),
                "number": number,
                "next": {
                    "observation": torch.stack([state + moves, -state - moves], -1).float(),
                    "reward": number.unsqueeze(1) / 7,
                    "done": flag["terminated"] | flag["truncated"],
                    **flag,
                },
            },
            [last - first],
        )
        if self.witness in ids:
            batch["collector", "traj_ids"] = ids[self.witness]
        return batch

    def continued(self, position):
        """Whether the transition at this position is not the last of its episode (so far)."""
        if position + 1 == len(self):
            return False
        (_, episode, _), (_, following, _) = self.transitions[position : position + 2]
        return episode == following


def expected_slices(runs, length):
    """For the number of each stored transition: the numbers of its slice, and how many are valid.

    ``runs`` are pieces of lanes that lie next to each other in the buffer: (lane, first, last).
    """
    slices = {}
    for lane, first, last in runs:
        for position in range(first, last):
            numbers = [lane.transitions[position][0]]
            while len(numbers) < length and position + 1 < last and lane.continued(position):
                position += 1
                numbers.append(lane.transitions[position][0])
            slices[numbers[0]] = (numbers + numbers[-1:] * (length - len(numbers)), len(numbers))
    return slices


def assert_slices(rows, expected, written):
    """Every slice is as expected, and its rows are the ones that were written, with all keys."""
    batch_size, length = rows.batch_size
    for b in range(batch_size):
        numbers, n_valid = expected[int(rows["number"][b, 0])]
        assert rows["number"][b].tolist() == numbers
        assert rows["valid"][b].tolist() == [i < n_valid for i in range(length)]
    original = written[torch.searchsorted(written["number"].contiguous(), rows["number"])]
    assert (rows.select(*original.keys(True, True)) == original).all()


def snapshot(buffer):
    return (
        buffer.storage[:].clone(),
        buffer.writer.state_dict(),
        buffer.sampler.state_dict(),
        buffer.write_count,
    )


def assert_unchanged(buffer, before):
    contents, *rest = before
    assert set(buffer.storage[:].keys(True, True)) == set(contents.keys(True, True))
    assert (buffer.storage[:] == contents).all()
    assert snapshot(buffer)[1:] == tuple(rest)


def lengths_and_ends(*ends):
    return st.lists(st.tuples(st.integers(1, 7), st.sampled_from(ends)), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def make_buffer(tmp_path_factory):
    """Makes an empty buffer: memory-mapped or not, a TensorDictReplayBuffer or a ReplayBuffer."""

    def make(memmap, with_index, capacity, ndim=1):
        if memmap:
            storage = LazyMemmapStorage(
                capacity, ndim=ndim, scratch_dir=tmp_path_factory.mktemp("storage")
            )
        else:
            storage = LazyTensorStorage(capacity, ndim=ndim)
        return (TensorDictReplayBuffer if with_index else ReplayBuffer)(
            storage=storage, batch_size=7
        )

    return make


common = {
    "memmap": st.booleans(),
    "with_index": st.booleans(),
    "length": st.integers(1, 6),
    "spare": st.integers(-15, 4),
    "chunk": st.integers(1, 9),
    "seed": st.integers(0, 2**16),
}


@settings(max_examples=100, deadline=None)
@given(
    case=st.one_of(
        # an episode that is cut (a resumed run) is told by its observations or its id alone
        st.tuples(
            st.sampled_from(["observation", "episode", "trajectory"]),
            lengths_and_ends("terminated", "truncated", "cut"),
        ),
        st.tuples(st.just("done"), lengths_and_ends("terminated", "truncated")),
    ),
    **common,
)
@example(  # episodes told apart by done and by nothing but the observation, in one batch
    case=("episode", [(4, "terminated"), (3, "cut"), (4, "truncated")]),
    memmap=False,
    with_index=False,
    length=4,
    spare=0,
    chunk=5,
    seed=0,
)
def test_one_environment(make_buffer, case, memmap, with_index, length, spare, chunk, seed):
    witness, episodes = case
    lane = Lane(0, episodes, witness)
    assume(len(lane) >= length)
    capacity = max(len(lane) + spare, length, chunk)  # a negative spare wraps the ring
    buffer = make_buffer(memmap, with_index, capacity)
    for first in range(0, len(lane), chunk):
        buffer.extend(lane.tensordict(first, min(first + chunk, len(lane))))
    before = snapshot(buffer)

    torch.manual_seed(seed)
    slices = TransitionSlices(buffer)
    rows = slices.sample(64, length)

    oldest = max(0, len(lane) - capacity)
    assert len(slices) == len(lane) - oldest
    expected = expected_slices([(lane, oldest, len(lane))], length)
    assert_slices(rows, expected, lane.tensordict(0, len(lane)))
    rows.zero_()  # what was sampled is a copy
    assert_unchanged(buffer, before)


@settings(max_examples=100, deadline=None)
@given(
    witness=st.sampled_from(["observation", "trajectory", "done"]),
    episodes=st.lists(lengths_and_ends("terminated", "truncated"), min_size=1, max_size=3),
    **common,
)
def test_environments_side_by_side(
    make_buffer, witness, episodes, memmap, with_index, length, spare, chunk, seed
):
    lanes = [Lane(e, several, witness) for e, several in enumerate(episodes)]
    n_rows = min(map(len, lanes))
    assume(n_rows >= length)
    capacity = max(n_rows + spare, length, chunk)
    # TensorDictReplayBuffer refuses batches of a single row [E, 1]
    with_index &= chunk > 1 and n_rows % chunk != 1
    buffer = make_buffer(memmap, with_index, capacity * len(lanes), ndim=2)
    for first in range(0, n_rows, chunk):
        last = min(first + chunk, n_rows)
        buffer.extend(torch.stack([lane.tensordict(first, last) for lane in lanes]))
    before = snapshot(buffer)

    torch.manual_seed(seed)
    slices = TransitionSlices(buffer)
    rows = slices.sample(64, length)

    oldest = max(0, n_rows - capacity)
    assert len(slices) == (n_rows - oldest) * len(lanes)
    expected = expected_slices([(lane, oldest, n_rows) for lane in lanes], length)
    assert_slices(rows, expected, torch.cat([lane.tensordict(0, n_rows) for lane in lanes]))
    assert_unchanged(buffer, before)


@settings(max_examples=50, deadline=None)
@given(
    witness=st.sampled_from(["observation", "trajectory"]),
    episodes=st.lists(lengths_and_ends("terminated", "truncated"), min_size=2, max_size=3),
    **common,
)
def test_environments_flattened_one_after_the_other(
    make_buffer, witness, episodes, memmap, with_index, length, spare, chunk, seed
):
    lanes = [Lane(e, several, witness) for e, several in enumerate(episodes)]
    n_rows = min(map(len, lanes))
    assume(n_rows * len(lanes) >= length)
    capacity = max(n_rows * len(lanes) + spare, length, chunk * len(lanes))
    buffer = make_buffer(memmap, with_index, capacity)
    runs = []
    for first in range(0, n_rows, chunk):
        last = min(first + chunk, n_rows)
        buffer.extend(torch.cat([lane.tensordict(first, last) for lane in lanes]))
        runs += [(lane, first, last) for lane in lanes]
    lost = n_rows * len(lanes) - capacity  # by the ring, from the front
    while lost > 0:
        lane, first, last = runs.pop(0)
        if last - first > lost:
            runs.insert(0, (lane, first + lost, last))
        lost -= last - first

    torch.manual_seed(seed)
    rows = TransitionSlices(buffer).sample(64, length)

    expected = expected_slices(runs, length)
    assert_slices(rows, expected, torch.cat([lane.tensordict(0, n_rows) for lane in lanes]))


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
    for first in range(0, n_rows, 40):
        last = min(first + 40, n_rows)
        batch = torch.stack([lane.tensordict(first, last) for lane in lanes])
        buffer.extend(batch if ndim == 2 else batch[0])
    torch.manual_seed(0)
    rows = TransitionSlices(buffer).sample(160 * ndim * 100, 2)

    stored = torch.cat([lane.tensordict(n_rows - 160, n_rows)["number"] for lane in lanes])
    starts = rows["number"][:, 0]
    assert set(starts.tolist()) == set(stored.tolist())
    assert_uniform((starts.unsqueeze(1) == stored).sum(0).double())
    # Terminal transitions are reached from before as well.
    assert (rows["next", "terminated"].squeeze(-1) & rows["valid"])[:, 1].any()


def collect(env, frames, batch_frames):
    """Batches of a real collector, numbered, and whether each transition's episode goes on."""
    batches = []
    torch.manual_seed(0)
    env.set_seed(0)
    collector = Collector(env, None, frames_per_batch=batch_frames, total_frames=frames)
    for batch in collector:
        batch = batch.clone()
        first = frames // batch_frames * 1000 * len(batches)
        batch["number"] = first + torch.arange(batch.numel()).view(batch.shape)
        batches.append(batch)
    collector.shutdown()
    return batches


def make_pendulum():
    return GymEnv("InvertedPendulum-v5", device="cpu")


@pytest.mark.parametrize("memmap", [False, True])
@pytest.mark.parametrize("layout", ["[T]", "[E, T]", "[E, T] flattened"])
def test_slices_of_a_collector_on_mujoco(make_buffer, layout, memmap):
    # Random actions drop the pendulum within a few steps, so most slices meet an episode's end.
    env = make_pendulum() if layout == "[T]" else SerialEnv(2, make_pendulum)
    batches = collect(env, frames=320, batch_frames=64)
    ndim = 2 if layout == "[E, T]" else 1
    buffer = make_buffer(memmap, True, 200, ndim=ndim)
    followers = {}
    for batch in batches:
        buffer.extend(batch.reshape(-1) if layout == "[E, T] flattened" else batch)
    n_envs = 1 if layout == "[T]" else 2
    for e in range(n_envs):
        lane = [batch if layout == "[T]" else batch[e] for batch in batches]
        if layout == "[E, T] flattened":  # a step follows another within a batch only
            pieces = lane
        else:
            pieces = [torch.cat(lane)]
        for piece in pieces:
            numbers, done = piece["number"].tolist(), piece["next", "done"].flatten().tolist()
            for i, number in enumerate(numbers):
                goes_on = not done[i] and i + 1 < len(numbers)
                followers[number] = numbers[i + 1] if goes_on else None

    torch.manual_seed(1)
    rows = TransitionSlices(buffer).sample(512, 6)

    assert len(buffer) == 200
    n_ended_early = 0
    for numbers, valid in zip(rows["number"].tolist(), rows["valid"].tolist(), strict=True):
        number, n_valid = numbers[0], sum(valid)
        for step in range(1, 6):
            if followers[number] is None:
                assert not valid[step]
                assert numbers[step] == number
            else:
                number = followers[number]
                assert valid[step]
                assert numbers[step] == number
        n_ended_early += n_valid < 6
    assert 100 < n_ended_early < 500  # the check above saw both kinds
    same = rows["valid"][:, 1:]
    assert (rows["next", "observation"][:, :-1] == rows["observation"][:, 1:])[same].all()
    assert not rows["next", "terminated"].squeeze(-1)[:, :-1][same].any()
    if layout != "[E, T] flattened":
        ids = rows["collector", "traj_ids"]
        assert (ids == ids[:, :1]).all()
    assert (rows["next", "terminated"].squeeze(-1) & rows["valid"]).any()


@pytest.fixture
def filled():
    """A full ring of 20 with 30 transitions written, all observations equal."""
    lane = Lane(0, [(9, "terminated"), (9, "truncated"), (12, "terminated")], "done")
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(20), batch_size=7)
    for first in range(0, 30, 6):
        buffer.extend(lane.tensordict(first, first + 6))
    return lane, buffer


def test_the_newest_row_is_known_after_saving_and_loading(filled, tmp_path):
    lane, buffer = filled
    expected = expected_slices([(lane, 10, 30)], 5)
    buffer.dumps(tmp_path)
    state = buffer.state_dict()
    for load in ("loads", "load_state_dict"):
        loaded = TensorDictReplayBuffer(storage=LazyTensorStorage(20), batch_size=7)
        if load == "loads":
            loaded.loads(tmp_path)
        else:
            loaded.load_state_dict(state)
        rows = TransitionSlices(loaded).sample(200, 5)
        assert_slices(rows, expected, lane.tensordict(0, 30))


def test_the_newest_row_is_known_in_a_second_buffer_on_the_same_storage(filled):
    lane, buffer = filled
    view = ReplayBuffer(storage=buffer.storage, batch_size=7)
    rows = TransitionSlices(view).sample(200, 5)
    assert_slices(rows, expected_slices([(lane, 10, 30)], 5), lane.tensordict(0, 30))
    # and when the first one loads a state in which the ring was not full yet
    earlier = TensorDictReplayBuffer(storage=LazyTensorStorage(20), batch_size=7)
    earlier.extend(lane.tensordict(0, 13))
    buffer.load_state_dict(earlier.state_dict())
    rows = TransitionSlices(view).sample(200, 5)
    assert_slices(rows, expected_slices([(lane, 0, 13)], 5), lane.tensordict(0, 30))


def test_a_buffer_that_another_process_fills(tmp_path):
    lane = Lane(0, [(9, "terminated"), (9, "truncated"), (12, "terminated")], "done")
    storage = LazyMemmapStorage(40, shared_init=True, scratch_dir=tmp_path)
    buffer = ReplayBuffer(storage=storage, batch_size=7, shared=True)
    slices = TransitionSlices(buffer)
    process = multiprocessing.get_context("spawn").Process(
        target=buffer.extend, args=(lane.tensordict(0, 30),)
    )
    process.start()
    process.join()
    assert len(slices) == 30
    assert_slices(
        slices.sample(200, 5), expected_slices([(lane, 0, 30)], 5), lane.tensordict(0, 30)
    )


def test_a_data_set_that_nobody_writes():
    lane = Lane(0, [(4, "truncated"), (6, "cut")], "done")
    data = lane.tensordict(0, 10)
    buffer = ReplayBuffer(
        storage=TensorStorage(data), writer=ImmutableDatasetWriter(), batch_size=7
    )
    rows = TransitionSlices(buffer).sample(200, 5)
    assert_slices(rows, expected_slices([(lane, 0, 10)], 5), data)


def test_a_data_set_that_does_not_lie_in_one_piece():
    lane = Lane(0, [(4, "truncated"), (6, "cut")], "done")
    data = torch.stack([lane.tensordict(0, 10)] * 2, 1)[:, 0]
    assert not data["observation"].is_contiguous()
    buffer = ReplayBuffer(
        storage=TensorStorage(data), writer=ImmutableDatasetWriter(), batch_size=7
    )
    rows = TransitionSlices(buffer).sample(200, 5)
    assert_slices(rows, expected_slices([(lane, 0, 10)], 5), data)


def test_a_writer_that_scrambles_the_rows():
    # Keeps the ten best rewards, the better half of which overwrites the rest from the worst on.
    lane = Lane(0, [(30, "truncated")], "observation")
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(10),
        writer=TensorDictMaxValueWriter(rank_key=("next", "reward")),
        batch_size=7,
    )
    data = lane.tensordict(0, 30)
    data["next", "reward"] = torch.randperm(30, generator=torch.manual_seed(0)).float().unsqueeze(1)
    buffer.extend(data)
    rows = TransitionSlices(buffer).sample(200, 4)
    steps = rows["number"] - rows["number"][:, :1]
    assert (steps == torch.arange(4))[rows["valid"]].all()
    assert len(set(rows["number"].flatten().tolist())) == 10


def test_the_sampler_of_the_buffer_is_left_alone():
    lane = Lane(0, [(9, "terminated"), (11, "truncated")], "observation")
    buffer = ReplayBuffer(
        storage=LazyTensorStorage(20), sampler=SamplerWithoutReplacement(), batch_size=5
    )
    buffer.extend(lane.tensordict(0, 20))
    seen = []
    for _ in range(4):
        seen += buffer.sample()["number"].tolist()
        TransitionSlices(buffer).sample(8, 4)
    assert sorted(seen) == list(range(20))  # each once, undisturbed by what is drawn in between


def test_seeds(filled):
    slices = TransitionSlices(filled[1])

    def draw(**kwargs):
        return slices.sample(50, 3, **kwargs)["number"].tolist()

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert draw() == first
    before = torch.get_rng_state()
    mine = draw(generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), before)
    assert draw() == second
    assert draw(generator=torch.Generator().manual_seed(5)) == mine
    assert mine not in (first, second)


def test_what_is_written_later_is_sampled():
    buffer = ReplayBuffer(storage=LazyTensorStorage(20), batch_size=7)
    slices = TransitionSlices(buffer)
    assert len(slices) == 0
    lane = Lane(0, [(12, "truncated")], "observation")
    for first in (0, 6):
        buffer.extend(lane.tensordict(first, first + 6))
        assert len(slices) == first + 6
        expected = expected_slices([(lane, 0, first + 6)], 4)
        assert_slices(slices.sample(100, 4), expected, lane.tensordict(0, 12))


@pytest.mark.parametrize("ndim", [1, 2])
def test_transforms_are_applied_as_the_buffer_applies_them(make_buffer, ndim):
    lane = Lane(0, [(7, "terminated"), (8, "truncated"), (15, "terminated")], "observation")
    buffer = make_buffer(False, True, 20, ndim=ndim)
    data = lane.tensordict(0, 30)
    buffer.append_transform(RewardScaling(loc=1.0, scale=3.0, in_keys=[("next", "reward")]))
    # after this, the observations no longer meet; after that, there is nothing to compare
    buffer.append_transform(ObservationNorm(loc=5.0, scale=2.0, in_keys=["observation"]))
    buffer.append_transform(ExcludeTransform(("next", "observation"), "collector"))
    buffer.append_transform(
        lambda rows: rows.set("shape", torch.tensor(rows.shape)[0].expand(rows.shape))
    )
    buffer.extend(data.unsqueeze(0) if ndim == 2 else data)
    before = snapshot(buffer)
    rows = TransitionSlices(buffer).sample(100, 4)

    expected = expected_slices([(lane, 10, 30)], 4)
    original = data[rows["number"]]
    assert rows["next", "reward"].allclose(3 * original["next", "reward"] + 1)
    assert rows["observation"].allclose(2 * original["observation"] + 5)
    assert ("next", "observation") not in rows.keys(True)
    assert "collector" not in rows
    assert (rows["shape"] == 400).all()  # transforms see [B * L] rows, as in buffer.sample
    for number, valid in zip(rows["number"].tolist(), rows["valid"].tolist(), strict=True):
        assert number == expected[number[0]][0]
        assert sum(valid) == expected[number[0]][1]
    assert_unchanged(buffer, before)
    theirs = buffer.sample()  # the buffer itself transforms in the same way
    assert theirs["observation"].allclose(2 * data["observation"][theirs["number"]] + 5)


def test_renamed_keys():
    lane = Lane(0, [(7, "terminated"), (8, "truncated"), (15, "terminated")], "trajectory")
    data = lane.tensordict(0, 30)
    renamed = data.clone()
    for old, new in {
        "observation": ("agent", "position"),
        ("next", "observation"): ("next", "agent", "position"),
        ("next", "done"): ("next", "over"),
        ("next", "terminated"): ("next", "failed"),
        ("collector", "traj_ids"): "run",
    }.items():
        renamed.rename_key_(old, new)
    del renamed["collector"]
    buffer = ReplayBuffer(storage=LazyTensorStorage(20), batch_size=7)
    buffer.extend(renamed)
    keys = {
        "observation_key": ("agent", "position"),
        "done_key": ("next", "over"),
        "terminated_key": ("next", "failed"),
        "trajectory_key": "run",
        "valid_key": ("mask", "valid"),
    }
    rows = TransitionSlices(buffer, **keys).sample(100, 4)
    assert "valid" not in rows.keys()
    rows["valid"] = rows["mask", "valid"]
    expected = expected_slices([(lane, 10, 30)], 4)
    assert_slices(rows, expected, renamed)


@pytest.mark.parametrize("key", [("next", "done"), ("next", "terminated")])
def test_either_end_ends_a_slice_whatever_its_width(key):
    # Two agents with a flag each: one is enough.
    data = Lane(0, [(12, "goes on")], "done").tensordict(0, 12)
    for name in ("done", "terminated"):
        data["next", name] = torch.zeros(12, 2, 1, dtype=torch.bool)
    data[(*key,)][5, 1] = True
    buffer = ReplayBuffer(storage=LazyTensorStorage(12), batch_size=7)
    buffer.extend(data)
    rows = TransitionSlices(buffer).sample(100, 4)
    last = torch.where(rows["number"][:, 0] <= 5, 5, 11)
    expected = rows["number"][:, :1] + torch.arange(4)
    assert torch.equal(rows["number"], torch.minimum(expected, last.unsqueeze(1)))
    assert torch.equal(rows["valid"], expected <= last.unsqueeze(1))


def test_trajectory_ids_can_be_ignored():
    lane = Lane(0, [(12, "cut"), (8, "cut")], "trajectory")
    buffer = ReplayBuffer(storage=LazyTensorStorage(20), batch_size=7)
    buffer.extend(lane.tensordict(0, 20))
    rows = TransitionSlices(buffer, trajectory_key=None).sample(200, 3)
    across = rows["number"].tolist().index([10, 11, 12])
    assert rows["valid"][across].all()


def test_images_and_entries_that_are_no_tensors():
    data = Lane(0, [(4, "terminated"), (6, "truncated")], "observation").tensordict(0, 10)
    data["observation"] = data["number"].view(10, 1, 1, 1).expand(10, 3, 4, 4).byte()
    data["next", "observation"] = data["observation"] + 1
    data["next", "observation"][6, 2, 3, 3] = 99  # one other pixel makes it another state
    data["instruction"] = NonTensorStack(*map(str, range(10)))
    buffer = ReplayBuffer(storage=LazyTensorStorage(10), batch_size=7)
    buffer.extend(data)
    rows = TransitionSlices(buffer).sample(100, 3)
    assert rows["observation"].shape == (100, 3, 3, 4, 4)
    for numbers, valid, said in zip(
        rows["number"].tolist(), rows["valid"].tolist(), rows["instruction"], strict=True
    ):
        last = min(end for end in (3, 6, 9) if end >= numbers[0])
        assert numbers == [min(numbers[0] + i, last) for i in range(3)]
        assert valid == [numbers[0] + i <= last for i in range(3)]
        assert list(said) == list(map(str, numbers))


@pytest.mark.parametrize("fill", [5000, 3000])
@pytest.mark.parametrize("layout", ["[T]", "[E, T]", "[E, T], lanes last in memory"])
def test_only_the_sampled_rows_are_touched(make_buffer, layout, fill):
    """Of what is as long as the buffer, there are views, and rows are selected from it."""
    lanes = [Lane(e, [(5000, "truncated")], "observation") for e in range(2)]
    data = torch.stack([lane.tensordict(0, fill) for lane in lanes])
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
            if max((t.numel() for t in tensors), default=0) >= fill:
                touched.append(func)
            return out

    with Watch():
        slices.sample(4, 3)
    names = {func.overloadpacket.__name__ for func in touched}
    assert "index_select" in names  # the watch sees what happens
    assert names <= {"index_select", "index", "view", "alias"}, names
    expected = expected_slices([(lane, 0, fill) for lane in lanes], 3)
    written = torch.cat([lane.tensordict(0, fill) for lane in lanes])
    assert_slices(slices.sample(64, 3), expected, written)


def filled_with(data, **kwargs):
    buffer = ReplayBuffer(storage=LazyTensorStorage(20, **kwargs), batch_size=7)
    buffer.extend(data)
    return buffer


def ten():
    return Lane(0, [(4, "terminated"), (6, "truncated")], "observation").tensordict(0, 10)


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
        (lambda: filled_with(ten().view(5, 2)), ValueError, r"\[2\].*ndim=1.*ndim=2"),
        (
            lambda: filled_with(ten().exclude("observation")),
            KeyError,
            r"'observation'.*Available:.*\('next', 'observation'\)",
        ),
        (
            lambda: filled_with(ten().exclude(("next", "observation"))),
            KeyError,
            r"\('next', 'observation'\).*Available:.*number",
        ),
        (lambda: filled_with(ten().exclude(("next", "done"))), KeyError, r"\('next', 'done'\)"),
        (
            lambda: filled_with(ten().exclude(("next", "terminated"))),
            KeyError,
            r"\('next', 'terminated'\)",
        ),
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
            lambda: filled_with(ten().set("valid", torch.zeros(10))),
            ValueError,
            "'valid'.*valid_key",
        ),
    ],
)
def test_buffers_that_cannot_be_sliced(buffer, error, told):
    buffer = buffer()
    with pytest.raises(error, match=f"(?s){told}"):
        TransitionSlices(buffer).sample(8, 4)


@pytest.mark.parametrize(
    ("batch_size", "length", "error", "told"),
    [
        (0, 3, ValueError, "batch_size.*0"),
        (3, 0, ValueError, "length.*0"),
        (3, -1, ValueError, "length.*-1"),
        (3, 2.0, TypeError, r"length.*2\.0"),
        (None, 2, TypeError, "batch_size.*None"),
    ],
)
def test_counts_that_make_no_sense(batch_size, length, error, told):
    slices = TransitionSlices(filled_with(ten()))
    slices.sample(3, 3)
    with pytest.raises(error, match=told):
        slices.sample(batch_size, length)


def test_a_transform_that_changes_the_number_of_rows():
    buffer = filled_with(ten())
    buffer.append_transform(lambda rows: rows[::2])
    with pytest.raises(ValueError, match=r"\[12\].*\[6\]"):
        TransitionSlices(buffer).sample(4, 3)
