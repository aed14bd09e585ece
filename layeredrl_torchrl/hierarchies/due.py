"""Which instances of a batch something is done for."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from tensordict import TensorDictBase
from torch import Tensor

from layeredrl_torchrl._watch import is_at_once

__all__ = ["Due"]

Values = TypeVar("Values", Tensor, TensorDictBase)


class Due:
    """Some instances of ``[*B]``: their values are picked, worked on, and merged back.

    On a CPU only those are picked that are due. On an accelerator, where counting them would wait
    for the device, all are worked on and the results of the others dropped.

    Args:
        mask: Which ones, bool ``[*B, 1]``.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask, self.index = mask, None
        self.everywhere = self.nowhere = False
        if is_at_once(mask):
            n = int(mask.sum())
            self.nowhere, self.everywhere = n == 0, n == mask.numel()
            if not (self.nowhere or self.everywhere):
                self.index = mask.squeeze(-1).nonzero(as_tuple=True)

    def pick(self, values: Any) -> Any:
        """Of tensors (or TensorDicts) ``[*B, ...]`` what is worked on."""
        return values if self.index is None or values is None else values[self.index]

    def merge(self, whole: Values, part: Values) -> Values:
        """``whole [*B, ...]`` with ``part``, as :meth:`pick` laid it out, where it is due."""
        if self.everywhere:
            return part
        if self.index is not None:
            whole = whole.clone()
            whole[self.index] = part.to(whole.dtype) if isinstance(part, Tensor) else part
            return whole
        if isinstance(whole, Tensor):
            return self._where(whole, part)
        return whole.apply(self._where, part)

    def _where(self, whole: Tensor, part: Tensor) -> Tensor:
        mask = self.mask.reshape(*self.mask.shape[:-1], *[1] * (whole.ndim - self.mask.ndim + 1))
        return torch.where(mask, part.to(whole.dtype), whole)
