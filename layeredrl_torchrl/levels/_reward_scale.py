"""The scale of rewards in a model-free level."""

from __future__ import annotations

import torch
from torch import Tensor

from layeredrl_torchrl._outliers import warn_of_outliers
from layeredrl_torchrl._precision import KeepsDoubles

__all__ = ["RewardScale"]


class RewardScale(KeepsDoubles):
    """Divides rewards by the root mean square of the nonzero ones.

    So learning rates, the temperature of SAC and the clipping of losses work for rewards in any
    unit, and a sparse reward keeps its size however rare it is.

    If nothing terminates and no reward is 0, an offset of all rewards does not change the best
    policy. An offset above 5 times their spread is then subtracted, fully from 20 times on, so that
    their spread is learned.
    """

    count: Tensor  # [] float64, rewards other than 0
    square: Tensor  # [] float64, mean of their squares
    mean: Tensor  # [] float64, their mean
    shifts: Tensor  # [] bool, whether an offset may be subtracted

    def __init__(self) -> None:
        super().__init__()
        for name in ("count", "square", "mean"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))
        self.register_buffer("shifts", torch.ones((), dtype=torch.bool))

    @torch.no_grad()
    def observe(self, reward: Tensor, ended: Tensor) -> None:
        """Add rewards ``[N, 1]`` to the statistics, and whether a return ends with them."""
        reward = reward.to(self.square)
        varied = self._std() > 1e-6 * self.mean.abs()
        counts = reward != 0
        n = counts.sum()
        self.count += n
        total = self.count.clamp_min(1.0)
        self.square += (reward.square().sum() - n * self.square) / total
        self.mean += (reward.sum() - n * self.mean) / total
        self.shifts.logical_and_(counts.all() & ~ended.any())
        std = self._std()
        std = torch.where(std > 0, std, 1.0)
        # Rewards of 0 do not count, so replace them by the mean.
        paid = torch.where(counts, reward, self.mean)
        warn_of_outliers("reward", paid, self.mean, std, n=int(self.count), varied=varied)

    def _std(self) -> Tensor:
        """Return the standard deviation of the nonzero rewards."""
        return (self.square - self.mean.square()).clamp_min(0.0).sqrt()

    def forward(self, reward: Tensor) -> Tensor:
        """Return scaled rewards, in their own dtype."""
        std = self._std()
        share = ((self.mean.abs() / std.clamp_min(1e-300) - 5.0) / 15.0).clamp(0.0, 1.0)
        # Rewards that differ only by float32 rounding are the same.
        varies = self.shifts & (std > 1e-6 * self.mean.abs())
        offset = torch.where(varies, share * self.mean, 0.0)
        square = self.square - 2.0 * offset * self.mean + offset.square()
        scale = torch.where(square > 0.0, square.clamp_min(0.0).sqrt(), 1.0)
        return ((reward.to(offset) - offset) / scale).to(reward.dtype)
