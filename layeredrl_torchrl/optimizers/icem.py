"""The improved cross-entropy method."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layeredrl_torchrl.optimizers.noise import filter_noise, power_law_filter
from layeredrl_torchrl.optimizers.optimizer import Optimizer
from layeredrl_torchrl.optimizers.search import Parameters, Search

__all__ = ["ICEM"]


class ICEM(Optimizer):
    """Sample-efficient CEM for planning: Pinneri et al. 2020, arXiv 2008.06389, algorithm 1.

    It adds to CEM: noise correlated in time (section 3.1); populations that shrink by ``decay``
    with each iteration, never below twice the elites (3.2); elites kept from iteration to iteration
    and, shifted, from call to call (3.3); the mean as a candidate of the last iteration (3.4).
    Samples are clipped to the bounds. A shifted elite repeats its last step; in the paper, the last
    step is a new draw.

    >>> icem = ICEM(make_search(Bounded(-1.0, 1.0, (2,))), horizon=4, n_samples=100, decay=2.0)
    >>> icem.populations
    (100, 50, 25, 20, 20, 20)

    Args:
        search: The family of distributions, with its bounds.
        horizon: ``H``.
        beta: Exponent of the noise's spectrum ``1 / f^beta``; 0 is white.
        decay: Factor, at least 1, by which populations shrink.
        keep_ratio: Share of the elites to keep.
        **options: Those of :class:`~layeredrl_torchrl.Optimizer`.

    Raises:
        TypeError, ValueError: As :class:`~layeredrl_torchrl.Optimizer` and
            :func:`~layeredrl_torchrl.optimizers.power_law_noise`.
    """

    time_filter: Tensor  # [H, H]

    def __init__(
        self,
        search: Search,
        horizon: int = 15,
        *,
        beta: float = 1.0,
        decay: float = 1.25,
        keep_ratio: float = 0.3,
        **options: Any,
    ) -> None:
        super().__init__(search, horizon, decay=decay, keep_ratio=keep_ratio, **options)
        # Not in the state dict, since it follows from the arguments.
        self.register_buffer(
            "time_filter",
            power_law_filter(self.horizon, beta).to(search.dtype).to(search.device),
            persistent=False,
        )
        self.beta = beta

    def colour(self, white: Tensor) -> Tensor:
        """Give noise the spectrum ``1 / f^beta`` along the time axis."""
        return filter_noise(white, self.time_filter.to(white.dtype), dim=2)

    def propose(self, step: int, parameters: Parameters, noise: Tensor, kept: Tensor) -> Tensor:
        """Draw samples; add the kept elites and, in the last iteration, the mean."""
        parts = [self.search.sample(parameters, noise), kept]
        if step == len(self.populations) - 1:
            parts.append(self.search.mode(parameters).unsqueeze(1))
        return torch.cat(parts, 1)
