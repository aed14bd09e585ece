"""Hierarchies: levels of several time scales as one policy."""

from layeredrl_torchrl.hierarchies.hierarchy import Hierarchy

__all__ = ["Hierarchy"]
