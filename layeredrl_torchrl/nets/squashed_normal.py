"""A squashed Gaussian that never waits for a device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.nn import functional as F

from layeredrl_torchrl._precision import KeepsFloats

__all__ = ["Bounds", "SquashedNormal"]


class Bounds(KeepsFloats):
    """Bounds of an action, ``low [A]`` and ``high [A]``, as buffers."""

    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.register_buffer("low", low.clone())
        self.register_buffer("high", high.clone())


class SquashedNormal(Distribution):
    """A Gaussian squashed by tanh into bounds, like TorchRL's ``TanhNormal`` without its checks.

    TorchRL's checks wait for the device at every call, and copy the bounds to it.

    >>> dist = SquashedNormal(
    ...     torch.zeros(7, 1), torch.ones(7, 1), Bounds(-torch.ones(1), torch.ones(1))
    ... )
    >>> action, log_prob = dist.rsample_and_log_prob()
    >>> action.shape, log_prob.shape
    (torch.Size([7, 1]), torch.Size([7]))

    Args:
        loc: Mean before squashing, ``[*B, A]``.
        scale: Std before squashing, ``[*B, A]``, positive.
        bounds: Bounds of the action.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, bounds: Bounds) -> None:
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)
        self.loc, self.scale = loc, scale
        self.half = (bounds.high - bounds.low) / 2
        self.middle = bounds.low + self.half

    def rsample_and_log_prob(self, sample_shape: Any = ()) -> tuple[Tensor, Tensor]:
        """Sample ``[*S, *B, A]`` with its log density ``[*S, *B]``, exact even at the bounds."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        before = self.loc + self.scale * noise
        return self._squash(before), self._density(before, noise)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Sample ``[*S, *B, A]``, with gradients."""
        return self.rsample_and_log_prob(sample_shape)[0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density ``[*B]`` of actions ``[*B, A]``; a bound counts as just within."""
        limit = 1.0 - torch.finfo(value.dtype).eps
        before = ((value - self.middle) / self.half).clamp(-limit, limit).atanh()
        return self._density(before, (before - self.loc) / self.scale)

    @property
    def deterministic_sample(self) -> Tensor:
        """The median ``[*B, A]``."""
        return self._squash(self.loc)

    @property
    def mode(self) -> Tensor:
        """The median, in place of the mode, which has no closed form."""
        return self.deterministic_sample

    def _squash(self, before: Tensor) -> Tensor:
        return self.middle + self.half * before.tanh()

    def _density(self, before: Tensor, noise: Tensor) -> Tensor:
        gaussian = -0.5 * noise.square() - self.scale.log() - 0.5 * math.log(2.0 * math.pi)
        # log(1 - tanh(x)^2), without cancellation.
        slope = 2.0 * (math.log(2.0) - before - F.softplus(-2.0 * before))
        return (gaussian - slope - self.half.log()).sum(-1)
