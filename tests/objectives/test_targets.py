"""n-step targets against a loop over single transitions, and against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
def test_targets_equal_a_loop_over_single_transitions(dtype, tolerance, case):
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
        ("reward", torch.ones(()), r"\[\].*= 3"),
        ("reward", torch.ones(2, 3, dtype=torch.long), "int64"),
        ("reward", torch.tensor([[1.0, 2, 3], [4, math.nan, 6]]), r"nan.*\[1, 1\]"),
        ("terminated", torch.zeros(1, 3, dtype=torch.bool), r"\[1, 3\]"),
        ("terminated", torch.zeros(2, 3), "float32"),
        ("valid", torch.ones(2, 2, dtype=torch.bool), r"\[2, 2\]"),
        ("valid", torch.ones(2, 3), "float32"),
        ("elapsed_steps", torch.ones(2, 2), r"\[2, 2\]"),
        ("elapsed_steps", torch.tensor([[1, 1, 1], [1, 0, 1]]), "got 0 "),
        ("elapsed_steps", torch.tensor([[1, 1, 1], [1, 1, math.nan]]), "got nan "),
        ("gamma", 1.01, "1.01"),
        ("gamma", math.nan, "nan"),
        ("k_steps", 0, "0"),
        ("n_steps", 2.0, r"2\.0"),
    ],
)
def test_bad_input_names_the_argument_and_what_came_in(name, value, told):
    n_step_targets(**good_arguments())
    with pytest.raises((TypeError, ValueError), match=rf"^{name}\b(.|\n)*{told}"):
        n_step_targets(**{**good_arguments(), name: value})
