"""The part of an observation that a level sees."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torchrl.data import TensorSpec, Unbounded

__all__ = ["Choice", "ObservationMap"]

#: All of it (None), some of its entries, or a function from ``[*B, obs]`` to ``[*B, obs_i]``.
Choice: TypeAlias = Sequence[int] | Callable[[Tensor], Tensor] | None


class ObservationMap(nn.Module):
    """Maps observations ``[*B, obs]`` to the part that one level sees, ``[*B, obs_i]``.

    Args:
        choice: ``None`` for the whole observation, indices, or a function.
        space: Spec of one whole observation, ``[obs]``.

    Attributes:
        space: Spec of the part that the level sees.
        is_identity: Whether the level sees the whole observation.

    Raises:
        TypeError: A choice of another kind, or indices that are not integers. ValueError: Indices
            outside the observation, repeated or missing; a function with results of another shape.
    """

    index: Tensor

    def __init__(self, choice: Choice, space: TensorSpec) -> None:
        super().__init__()
        self.space, self.func = space, None
        self.is_identity = choice is None
        if choice is None:
            return
        if callable(choice):
            self.func = choice
            zero = space.zero().unsqueeze(0)
            seen = choice(zero)
            if not isinstance(seen, Tensor) or seen.ndim != 2 or seen.shape[0] != 1:
                shape = tuple(seen.shape) if isinstance(seen, Tensor) else type(seen).__name__
                raise ValueError(
                    f"its observation map gave {shape} for an observation of shape "
                    f"{tuple(zero.shape)}, expected (1, obs_i); map the last axis only"
                )
            self.space = Unbounded((seen.shape[-1],), dtype=seen.dtype)
            return
        width = space.shape[-1]
        try:
            index = [operator.index(i) for i in choice if not isinstance(i, bool)]
        except TypeError as error:
            raise TypeError(
                f"its observation map is {choice!r}, expected a list of indices"
            ) from error
        if len(index) < len(choice):
            raise TypeError(f"its observation map is {choice!r}, expected indices, not flags")
        if not index or len(set(index)) < len(index) or not all(0 <= i < width for i in index):
            raise ValueError(
                f"its observation map is {index}, expected different indices from 0 to "
                f"{width - 1}, at least one"
            )
        self.register_buffer("index", torch.tensor(index), persistent=False)
        self.space = Unbounded((len(index),), dtype=space.dtype)

    def forward(self, observation: Tensor) -> Tensor:
        """Apply the map; shapes in the class docstring."""
        if self.is_identity:
            return observation
        if self.func is not None:
            return self.func(observation)
        return observation.index_select(-1, self.index)
