"""Imagined experience: a predictor as a TorchRL environment."""

from layeredrl_torchrl.imagination.predictor_env import PredictorEnv

__all__ = ["PredictorEnv"]
