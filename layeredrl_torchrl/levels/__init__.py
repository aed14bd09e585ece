"""Levels: policies of one time scale each, which learn from what they did."""

from layeredrl_torchrl.levels.level import Level
from layeredrl_torchrl.levels.planner_level import PlannerLevel

__all__ = ["Level", "PlannerLevel"]
