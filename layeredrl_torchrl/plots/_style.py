"""The common parts of all plots: figures, colours, and names of dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from layeredrl_torchrl._checks import check_indices, check_instance, require
from layeredrl_torchrl._padding import PADDING, padding_mask
from layeredrl_torchrl.predictors import Predictor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "GREY",
    "ORANGE",
    "changes",
    "is_real",
    "names_of",
    "new_figure",
    "real_rows",
    "shown_of",
    "states",
    "tidy",
]

BLUE, ORANGE, GREY = "#2a6fbb", "#d9722b", "#888888"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, with sizes in inches and without a window.

    Raises:
        ModuleNotFoundError: Matplotlib is not installed; the message tells how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'pictures need matplotlib: in the clone, python -m pip install -e ".[plots]"',
            name="matplotlib",
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def tidy(axis: Axes) -> None:
    """Draw a light grid, and no frame at the right and top."""
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def names_of(names: Sequence[str] | None, n: int) -> list[str]:
    """Return the names of ``n`` state dimensions; ``ValueError`` if there are not ``n``."""
    if names is None:
        return [f"state {d}" for d in range(n)]
    if len(names) != n:
        raise ValueError(f"names has {len(names)} entries, but the state has {n} dimensions")
    return list(names)


def is_real(predictor: Predictor, data: TensorDictBase) -> Tensor:
    """Return which rows ``[*B]`` are transitions and not TorchRL's padding.

    Raises:
        TypeError: Not a predictor; not a TensorDict. ValueError: No transition at all.
    """
    check_instance("predictor", predictor, Predictor, hint="a level has one: level.predictor")
    hint = "give what a collector yields, or TensorDict({...}, batch_size)"
    check_instance("data", data, TensorDictBase, hint=hint)
    mask = padding_mask(data, PADDING)
    if mask is None:
        mask = torch.ones(data.shape, dtype=torch.bool, device="cpu")
    if not bool(mask.any()):
        raise ValueError(f"data have the shape {tuple(data.shape)} and no transition to show")
    return mask.reshape(data.shape).cpu()


def real_rows(predictor: Predictor, data: TensorDictBase) -> TensorDictBase:
    """Return transitions ``[*B]`` as ``[N]``, without padding; raise as :func:`is_real`."""
    real = is_real(predictor, data).reshape(-1)
    return data.reshape(-1)[real]


def states(predictor: Predictor, data: TensorDictBase) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return state, context, action and next state of transitions ``[*B]``.

    Raises:
        KeyError: A missing entry.
    """
    hint = "give what a collector yields"
    action = require(data, predictor.model.in_keys[2], reader="a plot", hint=hint)
    following: Any = require(data, "next", reader="a plot", hint=hint)
    state, context = predictor.state_of(data)
    return state, context, action, predictor.state_of(following)[0]


def changes(state: Tensor, next_state: Tensor, dims: Sequence[int] | None) -> tuple[list[int], Any]:
    """Return the dimensions to show, by default those that change, and the std of their changes.

    Args:
        state: States ``[N, D]``.
        next_state: The states after a step.
        dims: The dimensions; ``None`` for all that change.

    Raises:
        ValueError: Dimensions outside the state; no dimension that changes; a single transition.
    """
    if len(state) < 2:
        raise ValueError("data has a single transition, so changes have no std; give more")
    unit = (next_state - state).std(0)
    shown = (unit > 1e-6).nonzero()[:, 0].tolist() if dims is None else shown_of(dims, len(unit))
    if not shown or not bool((unit[shown] > 0).all()):
        raise ValueError(
            f"no change of the state in dimension(s) {shown or 'of all'}; check the data"
        )
    return shown, unit[shown]


def shown_of(dims: Sequence[int], n: int) -> list[int]:
    """Return ``dims`` if they are at least one of the ``n`` state dimensions."""
    shown = check_indices("dims", dims, n)
    if not shown:
        raise ValueError("dims is empty; name dimensions of the state, or leave it out")
    return shown
