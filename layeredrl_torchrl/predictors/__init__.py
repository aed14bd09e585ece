"""Predictors: what planning needs to know about a task, in one module."""

from layeredrl_torchrl.predictors.predictor import Predictor
from layeredrl_torchrl.predictors.reward import RewardPredictor
from layeredrl_torchrl.predictors.static import StaticPredictor

__all__ = ["Predictor", "RewardPredictor", "StaticPredictor"]
