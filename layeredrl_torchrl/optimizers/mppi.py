"""Model predictive path integral control."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layeredrl_torchrl._checks import check_number
from layeredrl_torchrl.optimizers.optimizer import Optimizer
from layeredrl_torchrl.optimizers.search import Search

__all__ = ["MPPI"]


class MPPI(Optimizer):
    """Weights candidates by ``exp(-(S - min S) / (temperature * std S))``, ``S`` their costs.

    Follows Williams et al. 2017 (IEEE ICRA, "Information theoretic MPC"), eq. 34 and algorithm 2,
    with two changes. The temperature is in units of the standard deviation of the elites' costs, so
    that it suits rewards of any scale. The std of the samples is fitted like their mean, as in
    TorchRL's planner, since a plan takes several iterations.

    >>> mppi = MPPI(make_search(Bounded(-1.0, 1.0, (2,))), horizon=4, temperature=0.5)
    >>> mppi.weigh(torch.tensor([[1.0, 2.0]]))
    tensor([[0.9820, 0.0180]])

    Args:
        search: The family of distributions, with its bounds.
        horizon: ``H``.
        temperature: Positive; a lower temperature gives more weight to the best.
        **options: Those of :class:`~layeredrl_torchrl.Optimizer`. The paper's ``elite_ratio`` is 1:
            all candidates count.

    Raises:
        TypeError, ValueError: As :class:`~layeredrl_torchrl.Optimizer`; a temperature that is not
            positive and finite.
    """

    def __init__(
        self, search: Search, horizon: int = 15, *, temperature: float = 1.0, **options: Any
    ) -> None:
        super().__init__(search, horizon, **options)
        self.temperature = check_number("temperature", temperature, 0.0, open_low=True)

    def weigh(self, cost: Tensor) -> Tensor:
        """Return the softmax above; equal weights where all costs are equal."""
        # The first cost is the lowest; subtracting it prevents that all weights become 0.
        excess = cost - cost[:, :1]
        scale = cost.std(1, correction=0, keepdim=True).clamp_min(1e-30)
        unit = (self.temperature * scale).clamp_min(torch.finfo(scale.dtype).tiny)
        return (-excess / unit).softmax(1)
