"""Move the weights of one module towards those of another with the same structure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

__all__ = ["move_towards"]

# Where to find a module's tensors: walking through it takes longer than moving them.
_Places = list[tuple[dict[str, Any], str]]
_PLACES: WeakKeyDictionary[nn.Module, tuple[_Places, _Places]] = WeakKeyDictionary()


def _tensors(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return the current parameters and buffers of a module."""
    if module not in _PLACES:
        parts = list(module.modules())
        _PLACES[module] = (
            _places([part._parameters for part in parts]),
            _places([part._buffers for part in parts]),
        )
    parameters, buffers = ([of[name] for of, name in places] for places in _PLACES[module])
    return parameters, buffers


def _places(owners: Sequence[dict[str, Any]]) -> _Places:
    """Return where to find each tensor, once even if several layers share it."""
    found = {id(x): (of, name) for of in owners for name, x in of.items() if x is not None}
    return list(found.values())


@torch.no_grad()
def move_towards(average: nn.Module, source: nn.Module, share: float | Tensor) -> None:
    """Replace each parameter ``a`` of ``average`` by ``a + share * (s - a)``, and copy buffers.

    TorchRL's ``SoftUpdate`` does the same for the target networks of a loss; this function needs
    few calls for all parameters. A scalar tensor ``share`` stays on its device. Both modules must
    keep the layers that they had at the first call.
    """
    ours, old = _tensors(average)
    theirs, new = _tensors(source)
    if ours and isinstance(share, Tensor) and share.device.type != "cpu":
        change = torch._foreach_sub(theirs, ours)
        torch._foreach_mul_(change, share.to(change[0].dtype))
        torch._foreach_add_(ours, change)
    elif ours:
        torch._foreach_lerp_(ours, theirs, float(share))
    if old:
        torch._foreach_copy_(old, new)
