"""Where the members of an ensemble disagree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase

from layeredrl_torchrl._checks import check_indices, check_number, check_positive_int
from layeredrl_torchrl.models import EnsembleDisagreement
from layeredrl_torchrl.plots._style import names_of, new_figure, real_rows, states
from layeredrl_torchrl.predictors import RewardPredictor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_disagreement"]


@torch.no_grad()
def plot_disagreement(
    predictor: RewardPredictor,
    data: TensorDictBase,
    *,
    dims: Sequence[int] = (0, 1),
    names: Sequence[str] | None = None,
    margin: float = 0.5,
    n: int = 60,
) -> Figure:
    """Plot the disagreement of the members over two dimensions of the state, with the data.

    Other dimensions, context and action are those of the most central transition (the nearest to
    the median of all dimensions). Colours are in units of
    :class:`~layeredrl_torchrl.EnsembleDisagreement`.

    Args:
        predictor: A predictor with an ensemble of at least two members.
        data: Transitions ``[*B]``, drawn as points; padding is left out.
        dims: Two dimensions of the state.
        names: Names of all dimensions of the state.
        margin: Margin of the map around the data, as a share of their range.
        n: Number of points of the map along each axis, at least 2.

    Raises:
        ValueError: Not two dimensions of the state. KeyError: Data without observations or actions.
            TypeError: A model that is not an ensemble. ModuleNotFoundError: Matplotlib is not
            installed.
    """
    check_number("margin", margin, 0.0)
    check_positive_int("n", n, minimum=2)
    state, context, action, _ = states(predictor, real_rows(predictor, data))
    labels = names_of(names, state.shape[-1])
    first, second = _checked_pair(check_indices("dims", dims, len(labels)))
    bonus = EnsembleDisagreement(predictor.model)
    scale = state.std(0, correction=0).clamp_min(1e-6)
    middle = int(((state - state.median(0).values) / scale).square().sum(-1).argmin())
    axes_of = []
    for d in (first, second):
        low, high = state[:, d].min(), state[:, d].max()
        more = margin * (high - low).clamp_min(1e-6)
        axes_of.append(torch.linspace(float(low - more), float(high + more), n, device="cpu"))
    grid = torch.cartesian_prod(*axes_of).to(state)  # [n * n, 2]
    rows = state[middle].expand(len(grid), -1).clone()
    rows[:, [first, second]] = grid
    held = (x[middle].expand(len(grid), *x.shape[1:]) for x in (context, action))
    # The rows of the picture are the second axis.
    found = bonus(rows, *held).reshape(n, n).T.float().cpu()
    figure = new_figure(5.4, 4.2)
    axis = figure.subplots()
    mesh = axis.pcolormesh(*(x.numpy() for x in axes_of), found.numpy(), cmap="viridis")
    state = state.float().cpu()
    axis.plot(state[:, first], state[:, second], ".", color="white", ms=1.5, alpha=0.5)
    axis.set_xlabel(labels[first])
    axis.set_ylabel(labels[second])
    figure.colorbar(mesh, label="disagreement of the members")
    return figure


def _checked_pair(dims: list[int]) -> tuple[int, int]:
    if len(dims) != 2:
        raise ValueError(f"dims is {dims}, expected two dimensions of the state")
    return dims[0], dims[1]
