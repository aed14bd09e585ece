"""Imagined experience: a predictor as a TorchRL environment."""

from layeredrl_torchrl.imagination.limits import Disagrees, OutOfRange, TruncateWhere
from layeredrl_torchrl.imagination.predictor_env import PredictorEnv
from layeredrl_torchrl.imagination.starts import FromBuffer
from layeredrl_torchrl.imagination.value_gradient import ValueGradientLoss

__all__ = [
    "Disagrees",
    "FromBuffer",
    "OutOfRange",
    "PredictorEnv",
    "TruncateWhere",
    "ValueGradientLoss",
]
