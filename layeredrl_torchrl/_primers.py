"""Policies whose primer also carries the memory of their parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.modules.utils import get_primers_from_module

__all__ = ["OnePrimer"]


class OnePrimer(TensorDictModuleBase):
    """A policy whose ``make_tensordict_primer`` also carries the memory of its parts."""

    def apply(self, fn: Callable[[nn.Module], None]) -> Self:
        """As torch's, but TorchRL's search for primers, which uses it, does not go deeper."""
        if getattr(fn, "__module__", None) == get_primers_from_module.__module__:
            fn(self)
            return self
        return super().apply(fn)
