"""Risk measures against sorted lists."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layeredrl_torchrl.planners import CVaR, Mean, WorstCase


def slow_cvar(values, alpha):
    """The mean of the worst ``alpha * n`` values, the last of them in part."""
    left, total = alpha * len(values), 0.0
    for value in sorted(values):
        part = min(left, 1.0)
        total += part * value
        left -= part
        if left <= 0:
            break
    return total / (alpha * len(values))


particles = st.integers(1, 3).flatmap(
    lambda p: st.lists(
        st.lists(st.floats(-100, 100), min_size=p, max_size=p), min_size=1, max_size=4
    )
)


@settings(max_examples=60, deadline=None)
@given(returns=particles, alpha=st.floats(0.01, 1.0))
def test_cvar_is_the_mean_of_the_worst(returns, alpha):
    flat = [x for row in returns for x in row]
    result = CVaR(alpha)(torch.tensor(returns, dtype=torch.float64)).item()
    assert result == pytest.approx(slow_cvar(flat, alpha), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(returns=particles, alphas=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=2))
def test_the_more_careful_the_lower(returns, alphas):
    values = torch.tensor(returns, dtype=torch.float64)
    low, high = sorted(alphas)
    scores = [m(values).item() for m in (WorstCase(), CVaR(low), CVaR(high), Mean())]
    for a, b in pairwise(scores):
        assert a <= b + 1e-9


def test_the_ends_of_cvar_are_the_mean_and_the_worst():
    returns = torch.randn(5, 3, 4)
    torch.testing.assert_close(CVaR(1.0)(returns), Mean()(returns))
    torch.testing.assert_close(CVaR(1 / 12)(returns), WorstCase()(returns))
