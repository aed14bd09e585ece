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
def test_equals_the_filter_by_definition(n, beta, seed):
    generator = torch.Generator().manual_seed(seed % 2**31)
    white = torch.randn(n, generator=generator, dtype=torch.float64)
    expected = [z.real for z in slow_filter(white.tolist(), beta)]
    result = power_law_noise(white, beta)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("n", [15, 32])
def test_the_spectrum_falls_as_a_power_of_the_frequency(n, beta):
    noise = power_law_noise(torch.randn(20_000, n), beta)
    power = torch.fft.rfft(noise).abs().square().mean(0)
    frequency = torch.fft.rfftfreq(n)
    slope = (power[3].log() - power[1].log()) / (frequency[3].log() - frequency[1].log())
    assert slope.item() == pytest.approx(-beta, abs=0.05)
    assert power[0].item() == pytest.approx(power[1].item(), rel=0.05)


@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_each_sample_stays_standard_normal(n, beta):
    noise = power_law_noise(torch.randn(40_000, n), beta)
    assert noise.mean(0).abs().max() < 0.03
    assert (noise.var(0) - 1).abs().max() < 0.04
    kurtosis = noise.pow(4).mean(0) / noise.var(0).square()
    assert (kurtosis - 3).abs().max() < 0.2


def test_more_colour_is_smoother():
    white = torch.randn(5_000, 20)
    steps = [power_law_noise(white, beta).diff(dim=-1).square().mean() for beta in (0, 1, 2, 4)]
    assert steps[0] > steps[1] > steps[2] > steps[3]


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_any_axis_can_be_time(dim):
    white = torch.randn(5, 6, 7)
    expected = power_law_noise(white.movedim(dim, -1), 2.0).movedim(-1, dim)
    torch.testing.assert_close(power_law_noise(white, 2.0, dim=dim), expected)
