"""Dynamics models."""

from layeredrl_torchrl.models.ensemble import ProbabilisticEnsemble
from layeredrl_torchrl.models.mixture import GaussianMixture
from layeredrl_torchrl.models.model import Model

__all__ = ["GaussianMixture", "Model", "ProbabilisticEnsemble"]
