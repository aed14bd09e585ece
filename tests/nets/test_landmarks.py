"""Landmarks against ways that are known, and a slow search."""

from __future__ import annotations

import heapq
import itertools
import math

import pytest
import torch

from layeredrl_torchrl.nets import Landmarks, needs_next_state, reads_next_state


def walks(n: int = 12, steps: int = 80) -> torch.Tensor:
    """Random walks ``[n, steps, 2]`` in the plane."""
    torch.manual_seed(0)
    return torch.randn(n, steps, 2).mul(0.3).cumsum(1)


def slow_distance(landmarks: Landmarks, place, goal) -> float:
    """The same distance by Dijkstra's search from one place, edge by edge."""
    known = landmarks.places[: landmarks.count]
    aim = int((known - goal).norm(dim=-1).argmin())
    start = (known - place).norm(dim=-1)
    queue = [(float(d), i) for i, d in enumerate(start) if d <= 2 * landmarks.radius]
    heapq.heapify(queue)
    closed = set()
    while queue:
        length, i = heapq.heappop(queue)
        if i == aim:
            return length
        if i not in closed:
            closed.add(i)
            for j, step in enumerate((known - known[i]).norm(dim=-1).tolist()):
                if step <= 2 * landmarks.radius:
                    heapq.heappush(queue, (length + step, j))
    return math.inf


def test_distances_are_those_of_a_slow_search():
    paths = walks()
    landmarks = Landmarks(2, radius=0.4)
    landmarks.extend(paths)
    places, goals = torch.randn(50, 2) * 2, paths.reshape(-1, 2)[torch.randperm(960)[:50]]
    found = landmarks.distance(places, goals)
    expected = [slow_distance(landmarks, *pair) for pair in zip(places, goals, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert found.isinf().any()
    assert found.isfinite().sum() > 20
    # In any shape, and one by one.
    both = landmarks.distance(places.reshape(5, 10, 2), goals.reshape(5, 10, 2))
    assert torch.equal(both.flatten(), found)
    torch.testing.assert_close(landmarks.distance(places[3], goals[3]), found[3])


def test_ways_lead_along_a_corridor_and_not_through_its_wall():
    corner = torch.tensor([[0.0, 0.0], [3.0, 0.0], [3.0, 2.0], [0.0, 2.0]])
    path = torch.cat(
        [a + (b - a) * torch.linspace(0, 1, 31)[:, None] for a, b in itertools.pairwise(corner)]
    )
    landmarks = Landmarks(2, radius=0.25, scale=4.0, top=10.0)
    landmarks.extend(path)
    start, goal = corner[:1], corner[-1:]
    assert 7.6 < landmarks.distance(start, goal).item() < 8.4  # 3 + 2 + 3
    state = torch.cat([start, torch.randn(1, 2)], -1)
    value = landmarks.value(state, goal)
    torch.testing.assert_close(value, 10 * torch.exp(-landmarks.distance(start, goal) / 4))
    assert landmarks.value(torch.tensor([[1.0, 1.0]]), goal) == 0.0
    inside = torch.tensor([[1.0, 1.0], [1.0, 0.2], [1.0, 2.2], [5.0, 0.0]])
    assert landmarks.is_strange(state, goal, state, inside).tolist() == [True, False, False, True]
    assert needs_next_state(landmarks.is_strange)
    # Each step of the way is worth it: there is nowhere to get stuck.
    along = landmarks.distance(path, goal.expand_as(path))
    assert (along.diff() < 1e-5).all()


def test_by_default_the_value_is_1_at_the_goal_and_falls_with_the_distance():
    landmarks, state = Landmarks(1, radius=0.5), torch.tensor([[0.0], [1.0], [2.0]])
    landmarks.extend(state)
    value = landmarks.value(state, state[:1].expand(3, 1))
    torch.testing.assert_close(value, torch.exp(-state.squeeze(-1)))
    shaped = landmarks.value(state.view(1, 3, 1), state[:1].expand(1, 3, 1))
    assert torch.equal(shaped, value.unsqueeze(0))
    assert landmarks.is_strange(*[state.view(1, 3, 1) + 0.75] * 4).tolist() == [
        [False, False, True]
    ]


def test_a_place_as_far_as_the_radius_is_known():
    landmarks = Landmarks(1, radius=0.5)
    landmarks.extend(torch.tensor([[0.0], [0.5], [1.25]]))
    assert landmarks.places[: landmarks.count].flatten().tolist() == [0.0, 1.25]
    edge = torch.tensor([[-0.5], [-0.625]])
    assert landmarks.is_strange(edge, edge, edge, edge).tolist() == [False, True]


def test_each_place_that_was_seen_has_a_landmark():
    paths = walks()
    landmarks = Landmarks(2, radius=0.4)
    landmarks.extend(paths[:6])
    landmarks.extend(paths[6:])
    known = landmarks.places[: landmarks.count]
    assert torch.cdist(paths.reshape(-1, 2), known).amin(1).max() <= 0.4
    apart = torch.cdist(known, known).fill_diagonal_(math.inf)
    assert apart.min() > 0.4


def test_what_is_seen_later_joins_what_is_known():
    line = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    landmarks = Landmarks(2, radius=0.5)
    landmarks.extend(line[[0, 1, 3]])
    assert landmarks.distance(line[:2], line[1:3]).tolist() == [1.0, 0.0]  # 2 counts as 1
    assert landmarks.distance(line[:1], line[3:]).isinf()
    landmarks.extend(line[2])
    assert landmarks.distance(line[:1], line[3:]).item() == pytest.approx(3.0)


def test_few_visits_are_worth_more_than_many_and_near_ones_more_than_far_ones():
    paths = walks()
    landmarks = Landmarks(2, radius=0.4, scale=3.0, top=2.0)
    places = torch.cat([torch.randn(3, 2), torch.full((1, 2), 50.0)])
    state = torch.cat([places, torch.randn(4, 2)], -1)
    assert not landmarks.novelty(state, state).any()
    batches, visits = (paths[:6], paths[6:]), []
    for batch in batches:
        landmarks.extend(batch)
        visits += [0] * (int(landmarks.count) - len(visits))
        for i, mark in enumerate(landmarks.places[: landmarks.count]):
            visits[i] += int(((batch - mark).norm(dim=-1) <= 0.8).sum())
    assert min(visits) < 5
    assert max(visits) > 50
    marks = landmarks.places[: landmarks.count]
    expected = [
        max(
            2.0 * math.exp(-slow_distance(landmarks, place, mark) / 3.0) / math.sqrt(n)
            for mark, n in zip(marks, visits, strict=True)
        )
        for place in state[:, :2]
    ]
    found = landmarks.novelty(state.reshape(2, 2, 4), state)
    torch.testing.assert_close(found.flatten(), torch.tensor(expected), rtol=1e-3, atol=1e-6)
    assert (found == 0).any()
    assert (found > 0).any()


@reads_next_state
def at_goal(state, context, action, next_state):
    assert state.shape[-1] == next_state.shape[-1] == 4  # of which places are the first two
    return ((next_state[..., :2] - context).norm(dim=-1) < 0.1).float()


def test_the_value_of_a_goal_falls_along_a_line():
    line = torch.stack([torch.arange(6.0), torch.zeros(6)], -1)
    landmarks = Landmarks(2, radius=0.5)
    landmarks.extend(line)
    value = landmarks.value_of(at_goal, speed=0.5, discount=0.9)
    goals = line[[5, 2]].unsqueeze(1).expand(2, 6, 2)
    found = value(torch.cat([line, torch.randn(6, 2)], -1).expand(2, 6, 4), goals)
    # Two actions a landmark, of which those of the last pay already.
    hops = torch.tensor([[5, 4, 3, 2, 1, 0], [2, 1, 0, 1, 2, 3]])
    expected = 0.9 ** (2.0 * (hops - 1).clamp_min(0)) / 0.1
    torch.testing.assert_close(found, expected)
    states = torch.cat([line, torch.randn(6, 2)], -1).reshape(2, 3, 4)  # in any shape
    shaped = value(states, goals[:1].reshape(2, 3, 2))
    torch.testing.assert_close(shaped.flatten(), expected[0])
    nowhere = value(torch.full((1, 4), 9.0), line[5:])
    torch.testing.assert_close(nowhere, expected[0, :1])  # as little as from the far end


@pytest.mark.parametrize("batch", [(), (6,), (2, 3)])
def test_a_value_needs_no_context(batch):
    line = torch.stack([torch.arange(6.0), torch.zeros(6)], -1)
    landmarks = Landmarks(2, radius=0.5)
    landmarks.extend(line)

    def at_five(state, context, action):
        return (state[..., 0] > 4.9).float()

    value = landmarks.value_of(at_five, speed=0.5, discount=0.9)
    states = line.reshape(*batch, 2) if batch else line[0]
    with_goal = value(states, torch.zeros(*batch, 3))
    found = value(states, torch.zeros(*batch, 0))
    assert found.shape == batch
    assert found.max() > found.min() or not batch
    torch.testing.assert_close(found, with_goal)


def test_a_bad_place_is_passed_by_on_the_other_side():
    angle = torch.arange(12.0) * math.pi / 6
    ring = torch.stack([angle.cos(), angle.sin()], -1)
    side = 2 * math.sin(math.pi / 12)
    landmarks = Landmarks(2, radius=0.9 * side)

    @reads_next_state
    def reward(state, context, action, next_state):
        bad = (next_state[..., :2] - ring[2]).norm(dim=-1) < 0.1
        return at_goal(state, context, action, next_state) - 100.0 * bad

    landmarks.extend(ring)
    value = landmarks.value_of(reward, speed=side, discount=0.9)
    found = value(torch.cat([ring[[0, 3, 2]], torch.zeros(3, 2)], -1), ring[4].expand(3, 2))
    # From 0 it is four hops through 2, and eight the other way; who is at 2 leaves it.
    torch.testing.assert_close(found, 10 * 0.9 ** torch.tensor([7.0, 0.0, 1.0]))


def test_landmarks_are_saved_and_without_any_nothing_has_a_value():
    landmarks, other = (Landmarks(2, radius=0.4, capacity=20) for _ in range(2))
    state = torch.randn(7, 4)
    assert not landmarks.value(state, state[:, :2]).any()
    assert not landmarks.is_strange(state, state, state, state).any()
    value = landmarks.value_of(at_goal, speed=1.0, discount=0.9)
    assert torch.equal(value(state, state[:, :2]), torch.zeros(7))
    landmarks.extend(walks())
    assert landmarks.count == 20  # as many as there is room for
    other.load_state_dict(landmarks.state_dict())
    assert torch.equal(other.value(state, state[:, :2]), landmarks.value(state, state[:, :2]))


def test_cast_to_less_it_keeps_its_places_and_counts():
    """In bfloat16 256 visits and one more are 256."""
    landmarks, state = Landmarks(2, radius=0.4), torch.randn(7, 4)
    landmarks.extend(walks())
    expected, visits = landmarks.novelty(state, state), landmarks.visits.clone()
    landmarks = landmarks.to(torch.bfloat16)
    assert torch.equal(landmarks.novelty(state, state), expected)
    assert torch.equal(landmarks.visits, visits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_far_from_the_origin_are_those_near_it(dtype):
    torch.manual_seed(0)
    paths = (walks() * 64).round() / 64  # exact at both places
    shift, ends = 4096.0, paths[:, [0, -1]]
    near, far = (Landmarks(2, radius=0.4) for _ in range(2))
    near.extend(paths)
    far.extend(paths + shift)
    n = int(near.count)
    assert n > 30  # where torch.cdist multiplies matrices by default
    torch.testing.assert_close(far.places[:n] - shift, near.places[:n])
    a, b = ends.to(dtype).unbind(1)
    expected = near.distance(a, b)
    torch.testing.assert_close(far.distance(a + shift, b + shift), expected)
    assert expected.dtype == dtype
    assert expected.isfinite().sum() > 5
    torch.testing.assert_close(far.novelty(a + shift, b), near.novelty(a, b))
    torch.testing.assert_close(far.value(a + shift, b + shift), near.value(a, b))
    values = (
        marks.value_of(at_goal, speed=0.3, discount=0.9)(torch.cat([a, a], -1) + by, b + by)
        for marks, by in ((far, shift), (near, 0.0))
    )
    torch.testing.assert_close(*values)
    assert not far.is_strange(*[a + shift] * 4).any()


def test_before_anything_was_seen_no_way_is_known():
    landmarks = Landmarks(2, radius=0.4)
    assert landmarks.distance(torch.zeros(3, 2), torch.ones(3, 2)).isinf().all()


@pytest.mark.parametrize("places", [torch.tensor([[0.0, math.nan]]), torch.zeros(4, 3)])
def test_bad_places_leave_it_as_it_was(places):
    landmarks = Landmarks(2, radius=0.4)
    with pytest.raises(ValueError, match="places"):
        landmarks.extend(places)
    assert landmarks.count == 0
    with pytest.raises(ValueError, match="the context"):
        landmarks.value(torch.zeros(3, 4), torch.zeros(3, 0))


@pytest.mark.parametrize("bad", [{"radius": 0.0}, {"scale": 0.0}, {"capacity": 0}])
def test_numbers_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Landmarks(2, **{"radius": 0.5} | bad)


@pytest.mark.parametrize("bad", [{"speed": 0.0}, {"discount": 1.0}, {"discount": 0.0}])
def test_values_of_numbers_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Landmarks(2, radius=0.5).value_of(at_goal, **{"speed": 1.0, "discount": 0.9} | bad)


def test_a_reward_that_cannot_be_asked_is_refused_when_given():
    landmarks, short = Landmarks(2, radius=0.5), lambda state, context: state[..., 0]
    with pytest.raises(TypeError, match=r"reward takes the arguments .*\(state, context, action\)"):
        landmarks.value_of(short, speed=1.0, discount=0.9)
