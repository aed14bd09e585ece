"""Move the weights of one module towards those of another one of the same build."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["move_towards"]


@torch.no_grad()
def move_towards(average: nn.Module, source: nn.Module, share: float | Tensor) -> None:
    """Replace each parameter ``a`` of ``average`` by ``a + share * (s - a)``; buffers are copied.

    TorchRL's ``SoftUpdate`` does the same for the target networks of a loss; this makes few calls
    for all parameters. A ``share`` in a scalar tensor stays on its device.
    """
    ours: list[Tensor] = list(average.parameters())
    theirs: list[Tensor] = list(source.parameters())
    if ours and isinstance(share, Tensor) and share.device.type != "cpu":
        change = torch._foreach_sub(theirs, ours)
        torch._foreach_mul_(change, share.to(change[0].dtype))
        torch._foreach_add_(ours, change)
    elif ours:
        torch._foreach_lerp_(ours, theirs, float(share))
    old, new = list(average.buffers()), list(source.buffers())
    if old:
        torch._foreach_copy_(old, new)
