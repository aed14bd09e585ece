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
from layeredrl_torchrl.predictors.value_operator import value_operator
from layeredrl_torchrl.predictors.world_model import from_world_model

__all__ = [
    "DeltaStandardizer",
    "EarlyStopping",
    "ModelTraining",
    "Predictor",
    "PredictorFactory",
    "ReturnOptions",
    "RewardPredictor",
    "StaticPredictor",
    "from_world_model",
    "get_default_predictor_factory",
    "value_operator",
]
