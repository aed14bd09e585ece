"""Sampling optimizers of sequences; they know only a space and a cost."""

from layeredrl_torchrl.optimizers.cem import CEM
from layeredrl_torchrl.optimizers.icem import ICEM
from layeredrl_torchrl.optimizers.mppi import MPPI
from layeredrl_torchrl.optimizers.noise import power_law_noise
from layeredrl_torchrl.optimizers.optimizer import Optimizer, Solution
from layeredrl_torchrl.optimizers.search import (
    CategoricalSearch,
    GaussianSearch,
    Search,
    make_search,
)

__all__ = [
    "CEM",
    "ICEM",
    "MPPI",
    "CategoricalSearch",
    "GaussianSearch",
    "Optimizer",
    "Search",
    "Solution",
    "make_search",
    "power_law_noise",
]
