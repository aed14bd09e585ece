"""A predicted and a real trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from tensordict import TensorDictBase

from layeredrl_torchrl.models import TSInfinity
from layeredrl_torchrl.plots._style import (
    BLUE,
    ORANGE,
    names_of,
    new_figure,
    real_rows,
    shown_of,
    states,
    tidy,
)
from layeredrl_torchrl.predictors import Predictor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_prediction"]


@torch.no_grad()
def plot_prediction(
    predictor: Predictor,
    episode: TensorDictBase,
    *,
    dims: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    n_particles: int = 50,
) -> Figure:
    """Plot the prediction from the first observation and all actions, with the real trajectory.

    Each dimension shows its real course, the predicted mean, and two bands of two standard
    deviations: of all particles, and between the members' means. More data would narrow the second
    band. Every particle keeps its member (TSInfinity).

    Args:
        predictor: The predictor.
        episode: Consecutive transitions ``[T]`` of one episode; padding is left out.
        dims: Dimensions of the state; by default the four that vary most.
        names: Names of all dimensions of the state.
        n_particles: Particles of each member.

    Raises:
        ValueError: Another batch shape, or an episode that ends before the last transition.
            KeyError: Data without observations or actions. ModuleNotFoundError: Matplotlib is not
            installed.
    """
    rows = real_rows(predictor, episode)
    if episode.ndim != 1:
        raise ValueError(f"episode has the shape {tuple(episode.shape)}, expected one episode [T]")
    episode = rows
    done = episode.get(("next", "done"), None)
    if done is not None and bool(done[:-1].any()):
        raise ValueError(
            f"an episode ends at step {int(done[:-1].flatten().int().argmax())} of "
            f"{len(episode)}; give steps of one episode"
        )
    start, context, action, real = (x.cpu() for x in states(predictor, episode))
    labels = names_of(names, start.shape[-1])
    device = next((p.device for p in predictor.parameters()), start.device)
    traj = predictor.model.rollout(
        start[0].to(device),
        context[0].to(device),
        action.to(device),
        propagation=TSInfinity(n_particles=n_particles),
    )
    parts = predictor.model.uncertainty(traj).float().cpu()
    real = real.float()
    mean, between = parts["mean"], parts["epistemic_var"]
    total = between + parts["aleatoric_var"]
    if dims is None:
        dims = real.std(0, correction=0).argsort(descending=True)[:4].sort().values.tolist()
    shown = shown_of(dims, len(labels))
    time = np.arange(1, len(episode) + 1)
    figure = new_figure(7, 1.8 * len(shown) + 0.8)
    axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axis, d in zip(axes, shown, strict=True):
        for variance, color, alpha, label in (
            (total, BLUE, 0.2, "± 2 std, in all"),
            (between, ORANGE, 0.45, "± 2 std between members"),
        ):
            width = 2 * variance[:, d].sqrt()
            low, high = mean[:, d] - width, mean[:, d] + width
            axis.fill_between(
                time, low.numpy(), high.numpy(), color=color, alpha=alpha, lw=0, label=label
            )
        axis.plot(time, mean[:, d], color=BLUE, label="predicted mean")
        axis.plot(time, real[:, d], color="black", lw=1.2, ls="--", label="real")
        axis.set_ylabel(labels[d], fontsize=9)
        tidy(axis)
        bottom, top = float(real[:, d].min()), float(real[:, d].max())
        margin = max(top - bottom, 1e-3)
        axis.set_ylim(bottom - margin, top + margin)
    axes[0].legend(
        fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False
    )
    axes[-1].set_xlabel("steps ahead, open loop")
    return figure
