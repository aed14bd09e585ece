"""Dynamics models."""

from layeredrl_torchrl.models.disagreement import EnsembleDisagreement
from layeredrl_torchrl.models.ensemble import ProbabilisticEnsemble
from layeredrl_torchrl.models.mixture import GaussianMixture
from layeredrl_torchrl.models.model import Model
from layeredrl_torchrl.models.propagation import TS1, Expectation, Propagation, TSInfinity

__all__ = [
    "TS1",
    "EnsembleDisagreement",
    "Expectation",
    "GaussianMixture",
    "Model",
    "ProbabilisticEnsemble",
    "Propagation",
    "TSInfinity",
]
