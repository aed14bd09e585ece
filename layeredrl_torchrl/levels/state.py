"""Loading a saved state as a whole, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["check_state"]


def check_state(
    name: str, own: Mapping[str, Any], saved: Mapping[str, Any], *, strict: bool
) -> None:
    """Raise ``ValueError`` unless ``saved`` fits.

    Args:
        name: Whose state it is.
        own: Its state now.
        saved: What is to be loaded.
        strict: Whether both must have the same entries.
    """
    problems = []
    for key, value in own.items():
        if not isinstance(value, Tensor) or key not in saved:
            continue
        other = saved[key]
        if not isinstance(other, Tensor):
            problems.append(f"{key}: saved is a {type(other).__name__}, {name} has a Tensor")
        elif other.shape != value.shape:
            problems.append(
                f"{key}: saved is {tuple(other.shape)}, {name} has {tuple(value.shape)}"
            )
    if strict:
        problems += [f"{key}: not saved" for key in own.keys() - saved.keys()]
        problems += [f"{key}: not in {name}" for key in saved.keys() - own.keys()]
    if problems:
        shown = "; ".join(sorted(problems)[:5])
        raise ValueError(
            f"the saved state does not fit this {name} ({len(problems)} differences: {shown}), and "
            "nothing was loaded; build it with the sizes it was saved with, and set it up (a "
            "Hierarchy does) before loading"
        )
