"""Imagined experience: a predictor as a TorchRL environment."""

from layeredrl_torchrl.imagination.predictor_env import PredictorEnv
from layeredrl_torchrl.imagination.starts import FromBuffer

__all__ = ["FromBuffer", "PredictorEnv"]
