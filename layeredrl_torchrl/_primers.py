"""Policies whose primer includes the memory of their parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.modules.utils import get_primers_from_module

__all__ = ["OnePrimer"]


class OnePrimer(TensorDictModuleBase):
    """A policy whose ``make_tensordict_primer`` includes the memory of its parts."""

    def apply(self, fn: Callable[[nn.Module], None]) -> Self:
        """Apply like torch, but do not let TorchRL's search for primers go deeper."""
        if getattr(fn, "__module__", None) == get_primers_from_module.__module__:
            fn(self)
            return self
        return super().apply(fn)
