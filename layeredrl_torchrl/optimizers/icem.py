"""The improved cross-entropy method."""

from __future__ import annotations

import torch
from torch import Tensor

from layeredrl_torchrl._checks import check_positive_int
from layeredrl_torchrl.optimizers.noise import power_law_noise
from layeredrl_torchrl.optimizers.optimizer import Optimizer
from layeredrl_torchrl.optimizers.search import Parameters, Search

__all__ = ["ICEM"]


class ICEM(Optimizer):
    """Sample-efficient CEM for planning: Pinneri et al. 2020, arXiv 2008.06389, algorithm 1.

    Beside CEM: noise correlated in time (section 3.1); populations that shrink by ``decay`` from
    iteration to iteration, never below twice the elites (3.2); elites kept from iteration to
    iteration and, shifted, from call to call (3.3); the mean as a candidate of the last iteration
    (3.4). Samples are clipped to the bounds. A shifted elite repeats its last step, where the
    paper draws a new one.

    >>> icem = ICEM(make_search(Bounded(-1.0, 1.0, (2,))), horizon=4, n_samples=100, decay=2.0)
    >>> icem.populations
    (100, 50, 25, 20, 20, 20)

    Args:
        search: The family of distributions, with its bounds.
        horizon: ``H``.
        n_samples: Candidates drawn in the first iteration; kept elites come on top.
        n_iterations: Number of iterations.
        elite_ratio: Share of ``n_samples`` that the distribution is fitted to.
        momentum: Share of the old parameters in the new ones.
        beta: Exponent of the noise's spectrum ``1 / f^beta``; 0 is white.
        decay: Factor, at least 1, by which populations shrink.
        keep_ratio: Share of the elites that are kept.

    Raises:
        TypeError, ValueError: As :class:`~layeredrl_torchrl.Optimizer`; a decay below 1, a
            keep_ratio outside ``[0, 1]``, and as
            :func:`~layeredrl_torchrl.optimizers.power_law_noise`.
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
        beta: float = 1.0,
        decay: float = 1.25,
        keep_ratio: float = 0.3,
    ) -> None:
        check_positive_int("n_samples", n_samples, minimum=2)
        check_positive_int("n_iterations", n_iterations)
        if not decay >= 1.0:
            raise ValueError(f"decay must be at least 1, got {decay}")
        if not 0.0 <= keep_ratio <= 1.0:
            raise ValueError(f"keep_ratio must lie in [0, 1], got {keep_ratio}")
        power_law_noise(torch.zeros(1), beta)  # says so now if beta is none
        n_elites = round(elite_ratio * n_samples)
        least = min(2 * n_elites, n_samples)
        shrinking = [max(round(n_samples * decay**-i), least) for i in range(n_iterations)]
        super().__init__(
            search,
            horizon,
            populations=shrinking,
            n_elites=n_elites,
            momentum=momentum,
            n_kept=round(keep_ratio * n_elites),
        )
        self.beta = beta

    def colour(self, white: Tensor) -> Tensor:
        """``1 / f^beta`` along the axis of time."""
        return power_law_noise(white, self.beta, dim=2)

    def propose(self, step: int, parameters: Parameters, noise: Tensor, kept: Tensor) -> Tensor:
        """Samples of the distribution, what was kept, and at the end the mean."""
        parts = [self.search.sample(parameters, noise), kept]
        if step == len(self.populations) - 1:
            parts.append(self.search.mode(parameters).unsqueeze(1))
        return torch.cat(parts, 1)

    def weigh(self, cost: Tensor) -> Tensor:
        """``1 / n_elites`` each."""
        return torch.full_like(cost, 1.0 / cost.shape[1])
