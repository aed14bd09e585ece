"""Interpret a network's last layer as a mixture of Gaussians and a termination."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from layeredrl_torchrl._checks import check_number

__all__ = ["LogStdBounds", "MemberOutput", "mixture_parameters", "split_output"]

# The output of a member network: (mean, std), weights, term_prob.
MemberOutput: TypeAlias = tuple[tuple[Tensor, Tensor], Tensor, Tensor]


class LogStdBounds:
    """Soft bounds of a log standard deviation: ``center + half * tanh((raw - center) / half)``.

    PETS (arXiv 1805.12114, appendix A.1) uses two softplus functions and learns the bounds. Here
    the bounds are fixed, and calibration on held-out data compensates for that; on a CPU, one tanh
    takes a tenth of the time of two softplus functions.

    Args:
        low: Lower bound.
        high: Upper bound.

    Raises:
        ValueError: ``low`` is not below ``high``.
    """

    def __init__(self, low: float, high: float) -> None:
        for end in (low, high):
            check_number("one of log_std_bounds", end)
        if not low < high:
            raise ValueError(f"log_std_bounds are ({low}, {high}); the lower must come first")
        self.center = (low + high) / 2
        self.half = (high - low) / 2

    def __call__(self, raw: Tensor) -> Tensor:
        """Return the bounded log std, of the shape of ``raw``."""
        return self.center + self.half * torch.tanh((raw - self.center) / self.half)


def mixture_parameters(
    out: Tensor, n_modes: int, dim: int, log_std_bounds: LogStdBounds
) -> MemberOutput:
    """Interpret a network's last layer as a mixture of Gaussians and a termination probability.

    Args:
        out: ``[..., 2 * K * D + K + 1]``.
        n_modes: ``K``.
        dim: ``D``.
        log_std_bounds: Soft bounds of the log std.

    Returns:
        ``(mean [..., K, D], std [..., K, D]), weights [..., K], term_prob [...]`` in float32 or
        wider, also under ``torch.autocast``.
    """
    mean, raw, logits, term_logit = split_output(out, n_modes, dim)
    weights = logits.softmax(-1) if n_modes > 1 else torch.ones_like(logits)
    return (mean, log_std_bounds(raw).exp()), weights, term_logit.sigmoid()


def split_output(out: Tensor, n_modes: int, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split into means and raw log std ``[..., K, D]``, weight logits ``[..., K]``, termination."""
    if out.dtype in (torch.bfloat16, torch.float16):
        out = out.float()
    size = n_modes * dim
    mean, raw, logits, term_logit = out.split([size, size, n_modes, 1], dim=-1)
    shape = (n_modes, dim)
    return mean.unflatten(-1, shape), raw.unflatten(-1, shape), logits, term_logit.squeeze(-1)
