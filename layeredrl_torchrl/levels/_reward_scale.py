"""The unit in which a model-free level learns rewards."""

from __future__ import annotations

import torch
from torch import Tensor

from layeredrl_torchrl._outliers import warn_of_outliers
from layeredrl_torchrl._precision import KeepsDoubles

__all__ = ["RewardScale"]


class RewardScale(KeepsDoubles):
    """Divides rewards by the root mean square of those that are not 0.

    So learning rates, the temperature of SAC and the clipping of losses mean the same for rewards
    in any unit, and a sparse reward keeps its size however rare it is.

    Where nothing terminates and no reward is 0, an offset of all rewards changes no policy. One of
    more than 5 times their spread is subtracted, wholly from 20 times on, so that their spread is
    learned.
    """

    count: Tensor  # [] float64, rewards other than 0
    square: Tensor  # [] float64, mean of their squares
    mean: Tensor  # [] float64, their mean
    shifts: Tensor  # [] bool, whether an offset would change no policy

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
        # Those of 0, which do not count, are put where they do not stand out.
        paid = torch.where(counts, reward, self.mean)
        warn_of_outliers("reward", paid, self.mean, std, n=int(self.count), varied=varied)

    def _std(self) -> Tensor:
        """Standard deviation of the rewards that are not 0."""
        return (self.square - self.mean.square()).clamp_min(0.0).sqrt()

    def forward(self, reward: Tensor) -> Tensor:
        """Return rewards in their unit, in their own dtype."""
        std = self._std()
        share = ((self.mean.abs() / std.clamp_min(1e-300) - 5.0) / 15.0).clamp(0.0, 1.0)
        # Rewards that differ by what float32 rounds off are the same.
        varies = self.shifts & (std > 1e-6 * self.mean.abs())
        offset = torch.where(varies, share * self.mean, 0.0)
        square = self.square - 2.0 * offset * self.mean + offset.square()
        scale = torch.where(square > 0.0, square.clamp_min(0.0).sqrt(), 1.0)
        return ((reward.to(offset) - offset) / scale).to(reward.dtype)
