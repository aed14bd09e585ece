"""What a planner has to be for a level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.envs import TensorDictPrimer

__all__ = ["Planner"]


@runtime_checkable
class Planner(Protocol):
    """The planner of a :class:`PlannerLevel`: a policy whose memory can be forgotten.

    It is called with a TensorDict ``[*B]`` that has its ``in_keys``, and writes the action below
    ``action_key`` and what it remembers below ``"next"``. If it is a module that holds the
    predictor, it is saved with the level.
    """

    in_keys: list[Any]
    out_keys: list[Any]
    action_key: NestedKey

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write action and memory for ``[*B]``."""

    def forget(
        self, batch: Sequence[int] = (), device: torch.device | None = None
    ) -> TensorDictBase:
        """A memory of nothing for ``[*B]``, laid out as the root of a TensorDict carries it."""

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """The transform that carries the memory over steps; zeros are a memory of nothing."""
