"""Risk measures: they turn the returns of many imagined particles into one score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from layeredrl_torchrl._checks import check_number

__all__ = ["CVaR", "Mean", "RiskMeasure", "WorstCase"]


class RiskMeasure(ABC):
    """Maps the returns ``[*B, M, P]`` of members and their particles to scores ``[*B]``.

    >>> class Median(RiskMeasure):
    ...     def __call__(self, returns):
    ...         return returns.flatten(-2).median(-1).values
    >>> Median()(torch.tensor([[0.0, 1.0, 5.0]]))
    tensor(1.)
    """

    @abstractmethod
    def __call__(self, returns: Tensor) -> Tensor:
        """Score plans; shapes in the class docstring."""


@dataclass(frozen=True)
class Mean(RiskMeasure):
    """The expected return, which ignores risk.

    >>> from layeredrl_torchrl.planners import Mean
    >>> Mean()(torch.tensor([[0.0, 8.0], [2.0, 2.0]]))
    tensor(3.)
    """

    def __call__(self, returns: Tensor) -> Tensor:
        """Average over members and particles."""
        return returns.mean((-2, -1))


@dataclass(frozen=True)
class CVaR(RiskMeasure):
    """Conditional value at risk: the mean of the worst share ``alpha`` of the particles.

    A particle on the border of that share counts partly, so that the value is continuous in
    ``alpha``; ``alpha=1`` gives the mean (Rockafellar and Uryasev 2002, section 2).

    >>> CVaR(0.5)(torch.tensor([[0.0, 8.0], [2.0, 2.0]]))
    tensor(1.)

    Args:
        alpha: In ``(0, 1]``.

    Raises:
        TypeError, ValueError: ``alpha`` of another kind, or outside ``(0, 1]``.
    """

    alpha: float

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, 0.0, 1.0, open_low=True)

    def __call__(self, returns: Tensor) -> Tensor:
        """Average the worst particles."""
        returns = returns.flatten(-2)
        mass = self.alpha * returns.shape[-1]
        rank = torch.arange(returns.shape[-1], device=returns.device, dtype=returns.dtype)
        share = (mass - rank).clamp(0.0, 1.0) / mass
        return (returns.sort(-1).values * share).sum(-1)


@dataclass(frozen=True)
class WorstCase(RiskMeasure):
    """The return of the worst particle.

    >>> WorstCase()(torch.tensor([[0.0, 8.0], [2.0, 2.0]]))
    tensor(0.)
    """

    def __call__(self, returns: Tensor) -> Tensor:
        """Take the minimum over members and particles."""
        return returns.amin((-2, -1))


def score(risk: Callable[[Tensor], Tensor], returns: Tensor) -> Tensor:
    """Return the scores ``[*B, N]`` that ``risk`` gives for returns ``[*B, N, M, P]`` of plans.

    Raises:
        ValueError: ``risk`` returns anything else.
    """
    given, expected = risk(returns), tuple(returns.shape[:-2])
    if isinstance(given, Tensor) and given.shape == expected and given.dtype != torch.bool:
        return given
    name = getattr(risk, "__name__", type(risk).__name__)
    is_tensor = isinstance(given, Tensor)
    what = f"{given.dtype} {tuple(given.shape)}" if is_tensor else f"a {type(given).__name__}"
    raise ValueError(
        f"risk ({name}) gave {what} for returns {tuple(returns.shape)}, expected one number for "
        f"each plan, {expected}; reduce the last two axes, which are members and particles, such "
        "as returns.mean((-2, -1))"
    )
