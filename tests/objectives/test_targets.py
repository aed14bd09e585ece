"""n-step targets against a loop over single transitions, and against closed forms."""

from __future__ import annotations

import math
from collections import deque

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer

from layeredrl_torchrl.objectives.slices import TransitionSlices
from layeredrl_torchrl.objectives.targets import n_step_targets


def naive_targets(reward, terminated, valid, elapsed, k, n, gamma):
    """The definition, one transition at a time: lists of (return, index, discount) per step."""
    targets = []
    for j in range(k):
        total, discount, last = 0.0, 1.0, None
        for i in range(j, j + n):
            if not valid[i]:
                break
            total += discount * reward[i]
            discount *= gamma ** elapsed[i]
            last = i
        if last is None:
            targets.append((0.0, 0, 0.0))
        else:
            targets.append((total, last, 0.0 if terminated[last] else discount))
    return targets


@st.composite
def slices(draw):
    k, n = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    batch, length = draw(st.integers(1, 3)), k + n - 1

    def table(elements):
        row = st.lists(elements, min_size=length, max_size=length)
        return draw(st.lists(row, min_size=batch, max_size=batch))

    return {
        "k": k,
        "n": n,
        "gamma": draw(st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.0, 1.0))),
        "reward": table(st.floats(-100, 100)),
        "terminated": table(st.booleans()),
        "valid": table(st.booleans()),  # with gaps, which slices of a buffer do not have
        "elapsed": draw(st.one_of(st.none(), st.just(table(st.integers(1, 7))))),
    }


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
@settings(max_examples=150, deadline=None)
@given(case=slices())
def test_equals_a_loop_over_single_transitions(dtype, tolerance, case):
    k, n, gamma = case["k"], case["n"], case["gamma"]
    reward = torch.tensor(case["reward"], dtype=dtype)
    elapsed = None if case["elapsed"] is None else torch.tensor(case["elapsed"])

    targets = n_step_targets(
        reward,
        torch.tensor(case["terminated"]),
        torch.tensor(case["valid"]),
        k_steps=k,
        n_steps=n,
        gamma=gamma,
        elapsed_steps=elapsed,
    )

    # float32 is the least precision: half precision could not even count a hundred steps
    assert targets.returns.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    assert targets.bootstrap_index.dtype == torch.long
    for b in range(len(reward)):
        expected = naive_targets(
            reward[b].tolist(),
            case["terminated"][b],
            case["valid"][b],
            [1] * (k + n - 1) if elapsed is None else case["elapsed"][b],
            k,
            n,
            gamma,
        )
        returns, index, discount = zip(*expected, strict=True)
        scale = max(1.0, *map(abs, case["reward"][b]))
        assert targets.returns[b].tolist() == pytest.approx(returns, abs=n * scale * tolerance)
        assert targets.bootstrap_index[b].tolist() == list(index)
        assert targets.bootstrap_discount[b].tolist() == pytest.approx(discount, abs=n * tolerance)


@st.composite
def episodes(draw):
    """Episodes of one environment, the last one unfinished: (length, how it ends)."""
    ends = st.sampled_from(["terminated", "truncated"])
    finished = draw(st.lists(st.tuples(st.integers(1, 7), ends), max_size=6))
    return [*finished, (draw(st.integers(1, 7)), "unfinished")]


@settings(max_examples=60, deadline=None)
@given(
    episodes=episodes(),
    spare=st.integers(-10, 3),
    k=st.integers(1, 3),
    n=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_targets_of_buffer_slices_equal_a_loop_over_the_episodes(episodes, spare, k, n, seed):
    gamma, length = 0.9, k + n - 1
    n_written = sum(steps for steps, _ in episodes)
    capacity = max(n_written + spare, length)
    assume(n_written >= length)
    torch.manual_seed(seed)

    # Beside the buffer: what was written, by its number, in the order of writing.
    rewards = torch.randn(n_written).tolist()  # floats that float32 holds exactly
    elapsed = torch.randint(1, 4, (n_written,)).tolist()
    episode_end: list[tuple[int, str]] = []  # of each transition: its episode's last one, and how
    buffer = ReplayBuffer(storage=LazyTensorStorage(capacity), batch_size=1)
    stored: deque[int] = deque(maxlen=capacity)
    for steps, end in episodes:
        first = len(episode_end)
        numbers = torch.arange(first, first + steps)
        episode_end += [(first + steps - 1, end)] * steps
        is_last = (numbers == first + steps - 1).unsqueeze(1)
        # All observations are equal: nothing but done and the ring's newest row ends a slice.
        next_step = TensorDict(
            {
                "observation": torch.zeros(steps, 2),
                "reward": torch.tensor(rewards[first : first + steps]).unsqueeze(1),
                "done": is_last & (end != "unfinished"),
                "terminated": is_last & (end == "terminated"),
                "elapsed_steps": torch.tensor(elapsed[first : first + steps]).unsqueeze(1),
            },
            [steps],
        )
        batch = {"observation": torch.zeros(steps, 2), "number": numbers, "next": next_step}
        buffer.extend(TensorDict(batch, [steps]))
        stored.extend(numbers.tolist())

    rows = TransitionSlices(buffer).sample(64, length)
    targets = n_step_targets(
        rows["next", "reward"].squeeze(-1).double(),
        rows["next", "terminated"].squeeze(-1),
        rows["valid"],
        k_steps=k,
        n_steps=n,
        gamma=gamma,
        elapsed_steps=rows["next", "elapsed_steps"].squeeze(-1),
    )

    for b in range(64):
        start = int(rows["number"][b, 0])
        assert start in stored
        last, end = episode_end[start]  # the unfinished episode ends with the buffer
        for j in range(k):
            if start + j > last:
                assert targets.returns[b, j] == 0
                assert targets.bootstrap_discount[b, j] == 0
                continue
            total, discount, i = 0.0, 1.0, start + j
            for i in range(start + j, min(start + j + n, last + 1)):
                total += discount * rewards[i]
                discount *= gamma ** elapsed[i]
            if i == last and end == "terminated":
                discount = 0.0
            assert targets.returns[b, j].item() == pytest.approx(total, abs=1e-12)
            assert targets.bootstrap_discount[b, j].item() == pytest.approx(discount, abs=1e-12)
            assert int(rows["number"][b, targets.bootstrap_index[b, j]]) == i


def test_bootstrapping_with_the_true_values_gives_the_true_values():
    # Reward 1 a step, forever: V = 1 / (1 - gamma), whatever number of steps is looked ahead.
    gamma = 0.97
    for n in (1, 2, 10, 100):
        length = 3 + n - 1
        reward = torch.ones(2, length, dtype=torch.float64)
        never = torch.zeros(2, length, dtype=torch.bool)
        targets = n_step_targets(reward, never, ~never, k_steps=3, n_steps=n, gamma=gamma)
        value = 1 / (1 - gamma)
        total = targets.returns + targets.bootstrap_discount * value
        torch.testing.assert_close(total, torch.full_like(total, value))
        assert (targets.bootstrap_index == torch.arange(3) + n - 1).all()


def test_a_long_transition_discounts_like_the_steps_it_spans():
    gamma, spans = 0.95, [3, 1, 4]
    primitive = torch.randn(1, sum(spans), dtype=torch.float64)
    no = torch.zeros(1, sum(spans), dtype=torch.bool)
    step_by_step = n_step_targets(primitive, no, ~no, k_steps=1, n_steps=sum(spans), gamma=gamma)
    pieces = primitive.split(spans, dim=1)  # reward within a transition, discounted to its start
    macro = torch.stack(
        [(piece * gamma ** torch.arange(piece.shape[1])).sum(1) for piece in pieces], 1
    )
    targets = n_step_targets(
        macro,
        no[:, :3],
        ~no[:, :3],
        k_steps=1,
        n_steps=3,
        gamma=gamma,
        elapsed_steps=torch.tensor([spans]),
    )
    torch.testing.assert_close(targets.returns, step_by_step.returns)
    torch.testing.assert_close(targets.bootstrap_discount, step_by_step.bootstrap_discount)


def test_what_lies_in_invalid_steps_does_not_count():
    reward = torch.tensor([[1.0, 2.0, math.nan, math.inf]])
    elapsed = torch.tensor([[1.0, 1.0, math.nan, -1e9]])
    valid = torch.tensor([[True, True, False, False]])
    no = torch.zeros_like(valid)
    targets = n_step_targets(
        reward, no, valid, k_steps=3, n_steps=2, gamma=0.5, elapsed_steps=elapsed
    )
    assert targets.returns.tolist() == [[2.0, 2.0, 0.0]]
    assert targets.bootstrap_index.tolist() == [[1, 1, 0]]
    assert targets.bootstrap_discount.tolist() == [[0.25, 0.5, 0.0]]


def good_arguments():
    flags = torch.zeros(2, 3, dtype=torch.bool)
    return {
        "reward": torch.ones(2, 3),
        "terminated": flags,
        "valid": ~flags,
        "k_steps": 2,
        "n_steps": 2,
        "gamma": 0.9,
        "elapsed_steps": torch.ones(2, 3),
    }


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("reward", torch.ones(2, 3, 1), r"\[2, 3, 1\].*= 3"),
        ("reward", torch.ones(2, 4), r"\[2, 4\].*= 3"),
        ("reward", torch.ones(3), r"\[3\].*= 3"),
        ("reward", torch.ones(()), r"\[\].*= 3"),
        ("reward", torch.ones(2, 3, dtype=torch.long), "int64"),
        ("reward", torch.tensor([[1.0, 2, 3], [4, math.nan, 6]]), r"nan.*\[1, 1\]"),
        ("reward", torch.tensor([[1.0, 2, -math.inf], [4, 5, 6]]), "-inf"),
        ("terminated", torch.zeros(1, 3, dtype=torch.bool), r"\[1, 3\]"),
        ("terminated", torch.zeros(2, 3), "float32"),
        ("valid", torch.ones(2, 2, dtype=torch.bool), r"\[2, 2\]"),
        ("valid", torch.ones(2, 3), "float32"),
        ("elapsed_steps", torch.ones(2, 2), r"\[2, 2\]"),
        ("elapsed_steps", torch.tensor([[1, 1, 1], [1, 0, 1]]), "got 0 "),
        ("elapsed_steps", torch.tensor([[1, 1, 1], [1, 1, math.nan]]), "got nan "),
        ("gamma", 1.01, "1.01"),
        ("gamma", -0.5, "-0.5"),
        ("gamma", math.nan, "nan"),
        ("k_steps", 0, "0"),
        ("n_steps", 0, "0"),
    ],
)
def test_bad_input_names_the_argument_and_what_came_in(name, value, told):
    n_step_targets(**good_arguments())
    with pytest.raises(ValueError, match=rf"^{name}\b(.|\n)*{told}"):
        n_step_targets(**{**good_arguments(), name: value})


@pytest.mark.parametrize("name", ["k_steps", "n_steps"])
def test_counts_are_integers(name):
    with pytest.raises(TypeError, match=rf"^{name}\b.*2\.0"):
        n_step_targets(**{**good_arguments(), name: 2.0})
