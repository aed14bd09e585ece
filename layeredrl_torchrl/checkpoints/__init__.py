"""Checkpoints that are verified before reading, and states to resume a run bit for bit."""

from layeredrl_torchrl.checkpoints._rotation import SafeRotation
from layeredrl_torchrl.checkpoints.environments import CollectorState, EnvState
from layeredrl_torchrl.checkpoints.safe import SafeCheckpoint

__all__ = ["CollectorState", "EnvState", "SafeCheckpoint", "SafeRotation"]
