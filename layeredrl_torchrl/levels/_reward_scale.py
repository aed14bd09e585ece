"""The unit in which a model-free level learns rewards."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["RewardScale"]


class RewardScale(nn.Module):
    """Divides rewards by the root mean square of those that are not 0.

    So learning rates, the temperature of SAC and the clipping of losses mean the same for rewards
    in any unit, and a sparse reward keeps its size however rare it is.
    """

    count: Tensor  # [] float64, rewards other than 0
    square: Tensor  # [] float64, mean of their squares

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("square", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def observe(self, reward: Tensor) -> None:
        """Add rewards to the statistics."""
        reward = reward.to(self.square)
        n = (reward != 0).sum()
        self.count += n
        self.square += (reward.square().sum() - n * self.square) / self.count.clamp_min(1.0)

    def forward(self, reward: Tensor) -> Tensor:
        """Return rewards in units of the root mean square, in their own dtype."""
        scale = torch.where(self.square > 0.0, self.square.sqrt(), 1.0)
        return (reward / scale).to(reward.dtype)
