"""Noise that is correlated in time."""

from __future__ import annotations

import torch
from torch import Tensor

from layeredrl_torchrl._checks import check_number
from layeredrl_torchrl._precision import full_precision

__all__ = ["filter_noise", "power_law_filter", "power_law_noise"]


def power_law_noise(white: Tensor, beta: float, dim: int = -1) -> Tensor:
    """Colour white noise: give it the power spectrum ``1 / f^beta`` along one axis.

    The frequencies are those of a sequence of this length, ``k / H``; the constant part gets the
    power of the lowest one (Timmer and Koenig 1995, as in iCEM, arXiv 2008.06389, section 3.1). The
    filter is linear and normalised, so every single sample stays standard normal.

    >>> from layeredrl_torchrl.optimizers import power_law_noise
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
        TypeError, ValueError: ``beta`` that is not a number, negative or not finite.
    """
    return filter_noise(white, power_law_filter(white.shape[dim], beta).to(white), dim)


def power_law_filter(length: int, beta: float) -> Tensor:
    """Return :func:`power_law_noise` as a matrix ``[H, H]`` of float64 that multiplies columns."""
    check_number("beta", beta, 0.0)
    eye = torch.eye(length, dtype=torch.float64)
    if length == 1 or beta == 0.0:
        return eye
    frequency = torch.fft.rfftfreq(length, dtype=torch.float64)
    gain = frequency.clamp_min(1.0 / length).pow(-0.5 * beta)
    # The variance of a filtered sample is the mean of gain^2 over all frequencies, including the
    # mirror images that rfft leaves out.
    mirrored = gain[1 : (length + 1) // 2]
    gain = gain / ((gain.square().sum() + mirrored.square().sum()) / length).sqrt()
    matrix = torch.fft.irfft(torch.fft.rfft(eye, dim=0) * gain[:, None], n=length, dim=0)
    return matrix.contiguous()  # torch.distributed sends only contiguous tensors


def filter_noise(white: Tensor, matrix: Tensor, dim: int) -> Tensor:
    """Multiply ``matrix [H, H]`` with ``white`` along one axis, in full precision."""
    with full_precision(white.device):
        return (white.movedim(dim, -1) @ matrix.mT).movedim(-1, dim)
