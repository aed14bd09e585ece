"""How often the true next state is where the model predicts it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDict, TensorDictBase

from layeredrl_torchrl._checks import check_positive_int
from layeredrl_torchrl.plots._style import (
    BLUE,
    GREY,
    changes,
    names_of,
    new_figure,
    real_rows,
    states,
    tidy,
)
from layeredrl_torchrl.predictors import Predictor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_calibration"]


@torch.no_grad()
def plot_calibration(
    predictor: Predictor,
    data: TensorDictBase,
    *,
    dims: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    n_levels: int = 21,
) -> Figure:
    """Plot the share of real next states below each quantile of the prediction.

    On the diagonal a model is calibrated. Below the diagonal on the left and above it on the right,
    its std is too large; the other way round, it is overconfident. Each thin line is one dimension
    of the state, the thick line all together; the title gives its mean distance from the diagonal.

    Args:
        predictor: The predictor.
        data: Transitions ``[*B]`` outside the training data; padding is left out.
        dims: Dimensions of the state; all that change by default.
        names: Names of all dimensions of the state.
        n_levels: Number of quantiles, evenly spaced from 0 to 1; at least 2.

    Raises:
        KeyError: Data without observations or actions. ValueError: States that do not change.
            ModuleNotFoundError: Matplotlib is not installed.
    """
    check_positive_int("n_levels", n_levels, minimum=2)
    state, context, action, real = states(predictor, real_rows(predictor, data))
    labels = names_of(names, state.shape[-1])
    shown, _ = changes(state, real, dims)
    entries = dict(zip(predictor.model.in_keys, (state, context, action), strict=True))
    rows = TensorDict({}, [len(state)])
    for key, value in entries.items():
        rows.set(key, value)
    cdf = predictor.model.dist(rows).cdf(real)[:, shown].cpu()
    levels = torch.linspace(0, 1, n_levels, device="cpu")
    observed = (cdf <= levels[:, None, None]).double().mean(1)  # [levels, D]
    figure = new_figure(4.6, 4.6)
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="black", lw=0.8, ls="--", label="calibrated")
    for column, d in enumerate(shown):
        axis.plot(levels, observed[:, column], color=GREY, lw=0.7, label=labels[d])
    together = observed.mean(1)
    axis.plot(levels, together, color=BLUE, lw=2, label="all dimensions")
    gap = float((together - levels).abs().mean())
    axis.set_title(f"one step ahead, mean gap {gap:.3f}", fontsize=10)
    axis.set_xlabel("predicted probability to lie below")
    axis.set_ylabel("share that does")
    axis.set_aspect("equal")
    tidy(axis)
    lines, said = axis.get_legend_handles_labels()
    if len(shown) > 1:  # one entry for all thin lines
        lines, said = [lines[0], lines[1], lines[-1]], [said[0], "one dimension", said[-1]]
    axis.legend(lines, said, fontsize=8, frameon=False)
    return figure
