"""Coloured noise against a filter written out, and against its spectrum."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layeredrl_torchrl.optimizers import power_law_noise


def slow_filter(white, beta):
    """One sequence: a discrete Fourier transform by the definition, each frequency scaled."""
    n = len(white)
    gains = []
    for k in range(n):
        frequency = min(k, n - k) / n
        gains.append(max(frequency, 1 / n) ** (-beta / 2))
    norm = math.sqrt(sum(g * g for g in gains) / n)
    spectrum = [
        sum(white[t] * cmath.exp(-2j * math.pi * k * t / n) for t in range(n)) for k in range(n)
    ]
    return [
        sum(gains[k] / norm * spectrum[k] * cmath.exp(2j * math.pi * k * t / n) for k in range(n))
        / n
        for t in range(n)
    ]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 17), beta=st.sampled_from([0.0, 0.25, 1.0, 2.0, 3.5]), seed=st.integers(0))
def test_noise_is_filtered_as_by_definition(n, beta, seed):
    generator = torch.Generator().manual_seed(seed % 2**31)
    white = torch.randn(n, generator=generator, dtype=torch.float64)
    expected = [z.real for z in slow_filter(white.tolist(), beta)]
    result = power_law_noise(white, beta)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_any_axis_can_be_time(dim):
    white = torch.randn(5, 6, 7)
    expected = power_law_noise(white.movedim(dim, -1), 2.0).movedim(-1, dim)
    torch.testing.assert_close(power_law_noise(white, 2.0, dim=dim), expected)
