"""Process some instances of a batch."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor

from layeredrl_torchrl._watch import is_at_once

__all__ = ["Due"]

Values = TypeVar("Values", Tensor, TensorDictBase)


class Due:
    """Some instances of ``[*B]``: pick their values, process them, and merge the results back.

    On a CPU only the due instances are picked. On an accelerator, counting them would wait for the
    device, so all are processed and the results of the others are dropped.

    Args:
        mask: Which instances are due, bool ``[*B, 1]``.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask, self.index = mask, None
        self.everywhere = self.nowhere = False
        if is_at_once(mask):
            flags = mask.squeeze(-1).numpy()  # numpy counts several times faster than torch
            n = np.count_nonzero(flags)
            self.nowhere, self.everywhere = n == 0, n == flags.size
            if not (self.nowhere or self.everywhere):
                self.index = tuple(map(torch.from_numpy, np.nonzero(flags)))

    def pick(self, values: Any) -> Any:
        """Select the instances to process from tensors or TensorDicts ``[*B, ...]``."""
        if self.index is None or values is None:
            return values
        if len(self.index) == 1 and isinstance(values, Tensor):
            return values.index_select(0, self.index[0])  # several times faster
        return values[self.index]

    def write(self, whole: Tensor, part: Tensor) -> None:
        """Write ``part``, as from :meth:`pick`, into ``whole [*B, n]`` where instances are due."""
        if self.everywhere:
            whole.copy_(part)
        elif self.index is not None and len(self.index) == 1:
            whole.index_copy_(0, self.index[0], part.to(whole.dtype))
        elif self.index is not None:
            whole[self.index] = part.to(whole.dtype)
        else:
            whole.copy_(self._where(whole, part))

    def merge(self, whole: Values, part: Values) -> Values:
        """Replace ``whole [*B, ...]`` by ``part``, as from :meth:`pick`, where it is due."""
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
        mask = self.mask.reshape(self.mask.shape[:-1] + (1,) * (whole.ndim - self.mask.ndim + 1))
        return torch.where(mask, part.to(whole.dtype), whole)
