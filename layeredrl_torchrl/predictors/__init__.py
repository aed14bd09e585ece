"""Predictors: what planning needs to know about a task, in one module."""

from layeredrl_torchrl.predictors.early_stopping import EarlyStopping
from layeredrl_torchrl.predictors.factory import (
    PredictorFactory,
    get_default_predictor_factory,
)
from layeredrl_torchrl.predictors.predictor import Predictor
from layeredrl_torchrl.predictors.returns import ReturnOptions
from layeredrl_torchrl.predictors.reward import RewardPredictor
from layeredrl_torchrl.predictors.standardizer import DeltaStandardizer
from layeredrl_torchrl.predictors.static import StaticPredictor
from layeredrl_torchrl.predictors.training import ModelTraining

__all__ = [
    "DeltaStandardizer",
    "EarlyStopping",
    "ModelTraining",
    "Predictor",
    "PredictorFactory",
    "ReturnOptions",
    "RewardPredictor",
    "StaticPredictor",
    "get_default_predictor_factory",
]
