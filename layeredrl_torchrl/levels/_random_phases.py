"""Random phases: which instances of a batch act randomly, and for how long."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["random_phases"]


def random_phases(
    left: Tensor, warming_up: bool | Tensor, prob: float, duration: int
) -> tuple[Tensor | None, Tensor]:
    """Return which instances act randomly now, and how many random steps remain after this one.

    Args:
        left: Remaining random steps before this step, int64 ``[*B, 1]``.
        warming_up: Whether all instances act randomly anyway; this uses up no random steps.
        prob: Probability that a phase begins at a step outside of one.
        duration: Steps of a phase.

    Returns:
        Bool ``[*B, 1]``, or ``None`` if no instance acts randomly; and int64 ``[*B, 1]``.
    """
    none_left = torch.zeros_like(left)
    if warming_up is True:
        return torch.ones_like(left, dtype=torch.bool), none_left
    if not prob:
        if warming_up is False:
            return None, none_left
        return warming_up | torch.zeros_like(left, dtype=torch.bool), none_left
    starts = torch.rand(left.shape, device=left.device) < prob
    left = torch.where(starts & (left == 0), duration, left)
    random, after = left > 0, (left - 1).clamp_min(0)
    if isinstance(warming_up, Tensor):
        return warming_up | random, torch.where(warming_up, none_left, after)
    return random, after
