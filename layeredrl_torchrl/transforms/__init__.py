"""Transforms of environments and data that TorchRL does not have."""

from layeredrl_torchrl.transforms.flips import Angle, FlipTermination, QuaternionTilt
from layeredrl_torchrl.transforms.goals import JoinGoals
from layeredrl_torchrl.transforms.hindsight import RelabelGoals
from layeredrl_torchrl.transforms.multi_step import sum_rewards
from layeredrl_torchrl.transforms.rewards import AffineReward, LogReward
from layeredrl_torchrl.transforms.success import SuccessRate

__all__ = [
    "AffineReward",
    "Angle",
    "FlipTermination",
    "JoinGoals",
    "LogReward",
    "QuaternionTilt",
    "RelabelGoals",
    "SuccessRate",
    "sum_rewards",
]
