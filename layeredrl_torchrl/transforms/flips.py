"""End episodes of walkers that have flipped over."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.envs import TerminateTransform

from layeredrl_torchrl._checks import (
    check_callable,
    check_instance,
    check_number,
    check_per_item,
    check_positive_int,
    require,
)

__all__ = ["Angle", "FlipTermination", "QuaternionTilt"]


@dataclass(frozen=True)
class Angle:
    """Reads the tilt of a planar walker, an angle in its observation.

    >>> Angle(1)(torch.tensor([0.0, 0.5, 0.0]))
    tensor(0.5000)

    Args:
        index: Index of the angle in the observation (1 for gymnasium's Hopper, Walker2d and
            HalfCheetah).
    """

    index: int

    def __post_init__(self) -> None:
        check_instance("index", self.index, int, hint="pass the index of the angle")

    def __call__(self, observation: Tensor) -> Tensor:
        """Map observations ``[*B, obs]`` to angles ``[*B]`` in rad."""
        width = observation.shape[-1]
        if not -width <= self.index < width:
            raise ValueError(f"{self} reads an observation of {width} values; name another index")
        return observation[..., self.index]


@dataclass(frozen=True)
class QuaternionTilt:
    """Computes the angle between a body's z axis and the world's from its quaternion.

    >>> QuaternionTilt(0)(torch.tensor([0.0, 1.0, 0.0, 0.0]))  # half a turn about x
    tensor(3.1416)

    Args:
        first: Index of the first of the values ``w, x, y, z`` in the observation (1 for
            gymnasium's Ant).
    """

    first: int

    def __post_init__(self) -> None:
        check_positive_int("first", self.first, minimum=0)

    def __call__(self, observation: Tensor) -> Tensor:
        """Map observations ``[*B, obs]`` to angles ``[*B]`` in rad, from 0 to pi."""
        width = observation.shape[-1]
        if width < self.first + 4:
            raise ValueError(
                f"{self} reads 4 values, an observation has {width} values; name another index"
            )
        w, x, y, z = observation[..., self.first : self.first + 4].unbind(-1)
        # The rotated z axis is (.., .., w² - x² - y² + z²) for a unit quaternion; with its
        # horizontal part, atan2 is exact near both ends and needs no normalisation.
        horizontal = 2.0 * torch.hypot(x * z + w * y, y * z - w * x)
        return torch.atan2(horizontal, w**2 - x**2 - y**2 + z**2)


@dataclass(frozen=True)
class _Flipped:
    """Tells whether the tilt exceeds the limit; an object, so that environments can be pickled."""

    tilt: Callable[[Tensor], Tensor]
    limit: float
    key: NestedKey

    def __call__(self, next_tensordict: TensorDictBase) -> Tensor:
        hint = "name the observation by key="
        observation = require(next_tensordict, self.key, reader="FlipTermination", hint=hint)
        if observation.shape[:-1] != next_tensordict.batch_size:
            raise ValueError(
                f"FlipTermination reads {self.key!r} of shape {tuple(observation.shape)}, expected "
                f"[{', '.join(map(str, (*next_tensordict.batch_size, 'obs')))}]: one walker in "
                "each environment"
            )
        tilt = check_per_item("tilt", self.tilt(observation), observation.shape[:-1])
        # In this form NaN counts as flipped.
        return ~(tilt.abs() <= self.limit)


class FlipTermination(TerminateTransform):
    """Terminates the episode (``terminated`` and ``done``) where the tilt exceeds a limit.

    This is TorchRL's ``TerminateTransform`` with such a condition.

    >>> from torchrl.envs import GymEnv, TransformedEnv
    >>> env = TransformedEnv(GymEnv("HalfCheetah-v5"), FlipTermination(Angle(1)))
    >>> env.rollout(3)["next", "terminated"].flatten()
    tensor([False, False, False])

    Args:
        tilt: ``observation [*B, obs] -> [*B]`` rad: an :class:`Angle`, a
            :class:`QuaternionTilt`, or your own function.
        limit: Largest absolute tilt that is not a flip, in rad, above 0; a quarter turn by default.
        key: Key of the observation.

    Raises:
        ValueError: A limit that is not above 0.
    """

    def __init__(
        self,
        tilt: Callable[[Tensor], Tensor],
        limit: float = math.pi / 2,
        key: NestedKey = "observation",
    ) -> None:
        check_callable("tilt", tilt)
        check_number("limit", limit, 0.0, open_low=True)
        super().__init__(_Flipped(tilt, float(limit), key))
