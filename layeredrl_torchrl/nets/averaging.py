"""Moving the weights of one module towards those of another that is built alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["move_towards"]


@torch.no_grad()
def move_towards(average: nn.Module, source: nn.Module, share: float) -> None:
    """Replace each parameter ``a`` of ``average`` by ``a + share * (s - a)``; buffers are copied.

    What TorchRL's ``SoftUpdate`` does for a loss's target networks, in one call for all
    parameters.
    """
    ours: list[Tensor] = list(average.parameters())
    if ours:
        theirs: list[Tensor] = list(source.parameters())
        torch._foreach_lerp_(ours, theirs, share)
    for old, new in zip(average.buffers(), source.buffers(), strict=True):
        old.copy_(new)
