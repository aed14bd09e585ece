"""Actions in units of their bounds."""

from __future__ import annotations

from torch import Tensor
from torchrl.data import Bounded, TensorSpec

__all__ = ["finite_bounds", "from_unit", "to_unit"]


def finite_bounds(name: str, action_spec: TensorSpec, *, hint: str) -> tuple[Tensor, Tensor]:
    """Return both bounds ``[A]`` of an action, as floats.

    Args:
        name: Name of the caller, for the message.
        action_spec: Spec of one action.
        hint: Remedy for another kind of spec, for the message.

    Raises:
        TypeError: Not a ``Bounded`` spec. ValueError: Bounds that are not finite, not in order, or
            so far apart that scaling overflows.
    """
    if not isinstance(action_spec, Bounded):
        raise TypeError(
            f"{name} needs actions within bounds, a Bounded spec, got {action_spec}; {hint}"
        )
    low, high = action_spec.space.low, action_spec.space.high
    if not bool((low.isfinite() & high.isfinite() & (high > low)).all()):
        raise ValueError(
            f"{name} needs finite bounds with high above low, got low={low.tolist()}, "
            f"high={high.tolist()}; bound the actions in the environment"
        )
    low, high = low.clone().float(), high.clone().float()
    far = (~(2.0 * (high - low)).isfinite()).nonzero().flatten().tolist()
    if far:
        raise ValueError(
            f"{name} cannot scale to bounds that are too far apart for {low.dtype}, those of "
            f"dimension(s) {far} (low {low.tolist()}, high {high.tolist()}); such bounds usually "
            "stand for none: bound the actions in the environment by the range that they are "
            "really taken from"
        )
    return low, high


def to_unit(action: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Scale actions ``[*B, A]`` from their bounds to ``[-1, 1]``, in the bounds' precision."""
    return 2.0 * (action.to(low.dtype) - low) / (high - low) - 1.0


def from_unit(unit: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Scale ``[*B, A]`` from ``[-1, 1]`` to the bounds."""
    return low + 0.5 * (unit + 1.0) * (high - low)
