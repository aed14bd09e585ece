"""The cross-entropy method."""

from __future__ import annotations

import torch
from torch import Tensor

from layeredrl_torchrl._checks import check_positive_int
from layeredrl_torchrl.optimizers.optimizer import Optimizer
from layeredrl_torchrl.optimizers.search import Parameters, Search

__all__ = ["CEM"]


class CEM(Optimizer):
    """Fits the distribution to the best candidates, all counting alike (Botev et al. 2013).

    >>> cem = CEM(make_search(Bounded(-1.0, 1.0, (2,))), horizon=4)
    >>> solution = cem.optimize(lambda x: (x - 0.5).square().sum((-2, -1)))
    >>> bool((solution.mean - 0.5).abs().max() < 0.2)
    True

    Args:
        search: The family of distributions, with its bounds.
        horizon: ``H``.
        n_samples: Candidates in each iteration.
        n_iterations: Number of iterations.
        elite_ratio: Share of ``n_samples`` that the distribution is fitted to.
        momentum: Share of the old parameters in the new ones.

    Raises:
        TypeError, ValueError: As :class:`~layeredrl_torchrl.Optimizer`.
    """

    def __init__(
        self,
        search: Search,
        horizon: int = 15,
        *,
        n_samples: int = 256,
        n_iterations: int = 6,
        elite_ratio: float = 0.1,
        momentum: float = 0.1,
    ) -> None:
        check_positive_int("n_samples", n_samples, minimum=2)
        check_positive_int("n_iterations", n_iterations)
        super().__init__(
            search,
            horizon,
            populations=[n_samples] * n_iterations,
            n_elites=round(elite_ratio * n_samples),
            momentum=momentum,
        )

    def colour(self, white: Tensor) -> Tensor:
        """Noise stays white."""
        return white

    def propose(self, step: int, parameters: Parameters, noise: Tensor, kept: Tensor) -> Tensor:
        """Samples of the distribution."""
        return self.search.sample(parameters, noise)

    def weigh(self, cost: Tensor) -> Tensor:
        """``1 / n_elites`` each."""
        return torch.full_like(cost, 1.0 / cost.shape[1])
