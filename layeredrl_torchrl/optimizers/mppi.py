"""Model predictive path integral control."""

from __future__ import annotations

from torch import Tensor

from layeredrl_torchrl._checks import check_positive_int
from layeredrl_torchrl.optimizers.optimizer import Optimizer
from layeredrl_torchrl.optimizers.search import Parameters, Search

__all__ = ["MPPI"]


class MPPI(Optimizer):
    """Weights candidates by ``exp(-(S - min S) / (temperature * std S))``, ``S`` their costs.

    Follows Williams et al. 2017 (IEEE ICRA, "Information theoretic MPC"), eq. 34 and algorithm 2,
    with two changes: the temperature is in units of the standard deviation of the costs that
    count, so that it suits rewards of any scale; and the spread of the samples is fitted as their
    mean is, as TorchRL's planner does it, since one plan here is several iterations.

    >>> mppi = MPPI(make_search(Bounded(-1.0, 1.0, (2,))), horizon=4, temperature=0.5)
    >>> mppi.weigh(torch.tensor([[1.0, 2.0]]))
    tensor([[0.9820, 0.0180]])

    Args:
        search: The family of distributions, with its bounds.
        horizon: ``H``.
        n_samples: Candidates in each iteration.
        n_iterations: Number of iterations.
        elite_ratio: Share of ``n_samples``, the best, that count at all; 1 is the paper's.
        temperature: The lower, the more the best count; positive.
        momentum: Share of the old parameters in the new ones.

    Raises:
        TypeError, ValueError: As :class:`~layeredrl_torchrl.Optimizer`; a temperature that is not
            positive.
    """

    def __init__(
        self,
        search: Search,
        horizon: int = 15,
        *,
        n_samples: int = 256,
        n_iterations: int = 6,
        elite_ratio: float = 0.1,
        temperature: float = 1.0,
        momentum: float = 0.1,
    ) -> None:
        check_positive_int("n_samples", n_samples, minimum=2)
        check_positive_int("n_iterations", n_iterations)
        if not temperature > 0.0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        super().__init__(
            search,
            horizon,
            populations=[n_samples] * n_iterations,
            n_elites=round(elite_ratio * n_samples),
            momentum=momentum,
        )
        self.temperature = temperature

    def colour(self, white: Tensor) -> Tensor:
        """Noise stays white."""
        return white

    def propose(self, step: int, parameters: Parameters, noise: Tensor, kept: Tensor) -> Tensor:
        """Samples of the distribution."""
        return self.search.sample(parameters, noise)

    def weigh(self, cost: Tensor) -> Tensor:
        """The softmax above; equal weights where all costs are equal."""
        # Rising order: the first is the least. Without its subtraction all weights could be 0.
        excess = cost - cost[:, :1]
        scale = cost.std(1, correction=0, keepdim=True).clamp_min(1e-30)
        return (-excess / (self.temperature * scale)).softmax(1)
