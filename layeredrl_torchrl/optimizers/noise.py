"""Noise that is correlated in time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["power_law_noise"]


def power_law_noise(white: Tensor, beta: float, dim: int = -1) -> Tensor:
    """Colour white noise: its power spectrum along one axis becomes ``1 / f^beta``.

    The frequencies are those of a sequence of this length, ``k / H``; the constant part gets the
    power of the lowest of them (Timmer and Koenig 1995, as iCEM uses it, arXiv 2008.06389,
    section 3.1). It is a linear filter, so standard normal samples stay standard normal, each by
    itself.

    >>> white = torch.randn(1000, 20)
    >>> red = power_law_noise(white, beta=2.0)
    >>> bool(red.diff().std() < 0.5 * white.diff().std())  # smoother, and of the same variance
    True

    Args:
        white: Independent standard normal samples, of any shape.
        beta: The exponent; 0 leaves the noise white, 1 is pink, 2 is red.
        dim: The axis of time.

    Returns:
        A tensor of the same shape.

    Raises:
        ValueError: ``beta`` that is negative or not finite.
    """
    if not (math.isfinite(beta) and beta >= 0.0):
        raise ValueError(f"beta must be finite and at least 0, got {beta}")
    length = white.shape[dim]
    if length == 1 or beta == 0.0:
        return white
    frequency = torch.fft.rfftfreq(length, dtype=white.dtype, device=white.device)
    gain = frequency.clamp_min(1.0 / length).pow(-0.5 * beta)
    # The variance of a filtered sample is the mean of gain^2 over all frequencies, of which
    # rfft leaves out the mirror images.
    mirrored = gain[1 : (length + 1) // 2]
    gain = gain / ((gain.square().sum() + mirrored.square().sum()) / length).sqrt()
    gain = gain.view(-1, *[1] * (-dim - 1 if dim < 0 else white.ndim - dim - 1))
    return torch.fft.irfft(torch.fft.rfft(white, dim=dim) * gain, n=length, dim=dim)
