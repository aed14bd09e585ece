"""Return modes: they select the plan from an optimizer's solution."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

from torch import Tensor

from layeredrl_torchrl._checks import check_callable
from layeredrl_torchrl.optimizers import Solution

__all__ = ["ReturnMode", "best_plan", "find_return_mode", "mean_plan", "random_plan"]

ReturnMode: TypeAlias = Callable[[Solution], Tensor]


def mean_plan(solution: Solution) -> Tensor:
    """Return the mean of the final distribution; it is smooth, but may not have been evaluated."""
    return solution.mean


def best_plan(solution: Solution) -> Tensor:
    """Return the best candidate of all iterations."""
    return solution.best


def random_plan(solution: Solution) -> Tensor:
    """Return a sample of the final distribution, to explore."""
    return solution.random


_BY_NAME: Mapping[str, ReturnMode] = MappingProxyType(
    {"mean": mean_plan, "best": best_plan, "random": random_plan}
)


def find_return_mode(given: ReturnMode | str, name: str = "return_mode") -> ReturnMode:
    """Return the mode with this LayeredRL name; return functions unchanged."""
    if not isinstance(given, str):
        check_callable(name, given)
        return given
    if given not in _BY_NAME:
        raise ValueError(
            f"{name} is {given!r}, expected one of {sorted(_BY_NAME)} or a function from a "
            "Solution to a sequence"
        )
    return _BY_NAME[given]
