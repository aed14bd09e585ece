"""What all pictures share: the figure, its colours, and the names of dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tensordict import TensorDictBase
from torch import Tensor

from layeredrl_torchrl._checks import check_indices, require
from layeredrl_torchrl.predictors import Predictor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["BLUE", "GREY", "ORANGE", "changes", "names_of", "new_figure", "states", "tidy"]

BLUE, ORANGE, GREY = "#2a6fbb", "#d9722b", "#888888"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of inches, which no window shows.

    Raises:
        ModuleNotFoundError: Without matplotlib; the message says how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pictures need matplotlib: in the clone, python -m pip install -e '.[plots]'",
            name="matplotlib",
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def tidy(axis: Axes) -> None:
    """Draw a light grid, and no frame on the right and at the top."""
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def names_of(names: Sequence[str] | None, n: int) -> list[str]:
    """Return the names of ``n`` dimensions of the state; ``ValueError`` for another number."""
    if names is None:
        return [f"state {d}" for d in range(n)]
    if len(names) != n:
        raise ValueError(f"names has {len(names)} entries, but the state has {n} dimensions")
    return list(names)


def states(predictor: Predictor, data: TensorDictBase) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return state, context, action and next state of transitions ``[*B]``.

    Raises:
        KeyError: An entry that the data do not have.
    """
    hint = "give what a collector yields"
    action = require(data, predictor.model.in_keys[2], reader="a plot", hint=hint)
    following: Any = require(data, "next", reader="a plot", hint=hint)
    state, context = predictor.state_of(data)
    return state, context, action, predictor.state_of(following)[0]


def changes(state: Tensor, next_state: Tensor, dims: Sequence[int] | None) -> tuple[list[int], Any]:
    """Return the dimensions to show, those that change by default, and the std of their changes.

    Raises:
        ValueError: Dimensions outside the state; none that changes.
    """
    unit = (next_state - state).reshape(-1, state.shape[-1]).std(0)
    if dims is None:
        shown = (unit > 1e-6).nonzero()[:, 0].tolist()
    else:
        shown = check_indices("dims", dims, len(unit))
    if not shown or not bool((unit[shown] > 0).all()):
        raise ValueError(
            f"no change of the state in dimension(s) {shown or 'of all'}; see the data"
        )
    return shown, unit[shown]
