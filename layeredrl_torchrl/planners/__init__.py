"""Planners: policies that search for actions by imagining their outcome with a predictor."""

from layeredrl_torchrl.planners._sampling import CEMPlanner, ICEMPlanner, MPPIPlanner
from layeredrl_torchrl.planners.planner import PredictorPlanner
from layeredrl_torchrl.planners.proposals import PolicyProposal, Proposal
from layeredrl_torchrl.planners.return_modes import (
    ReturnMode,
    best_plan,
    mean_plan,
    random_plan,
)
from layeredrl_torchrl.planners.risk import CVaR, Mean, RiskMeasure, WorstCase

__all__ = [
    "CEMPlanner",
    "CVaR",
    "ICEMPlanner",
    "MPPIPlanner",
    "Mean",
    "PolicyProposal",
    "PredictorPlanner",
    "Proposal",
    "ReturnMode",
    "RiskMeasure",
    "WorstCase",
    "best_plan",
    "mean_plan",
    "random_plan",
]
