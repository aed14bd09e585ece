"""How errors grow with the prediction horizon."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from tensordict import TensorDictBase

from layeredrl_torchrl.models import TSInfinity
from layeredrl_torchrl.plots._style import (
    BLUE,
    GREY,
    ORANGE,
    changes,
    is_real,
    new_figure,
    states,
    tidy,
)
from layeredrl_torchrl.predictors import Predictor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_error_by_horizon"]


@torch.no_grad()
def plot_error_by_horizon(
    predictor: Predictor,
    episodes: TensorDictBase,
    *,
    dims: Sequence[int] | None = None,
    n_particles: int = 10,
) -> Figure:
    """Plot the error and the predicted std of open-loop predictions against the steps ahead.

    Both are root mean squares over episodes and dimensions, each in units of the std of its change
    in one step. Where the std follows the error, the model predicts its own error. The grey line is
    the error of predicting no change.

    Args:
        predictor: The predictor.
        episodes: Transitions ``[E, H]`` outside the training data; steps after an episode's end and
            padding do not count.
        dims: Dimensions of the state; all that change by default.
        n_particles: Particles of each member.

    Raises:
        ValueError: Another batch shape; states that do not change. KeyError: Data without
            observations or actions. ModuleNotFoundError: Matplotlib is not installed.
    """
    alive = is_real(predictor, episodes).clone()
    if episodes.ndim != 2:
        raise ValueError(
            f"episodes have the shape {tuple(episodes.shape)}, expected [E, H]: the first H steps "
            "of E episodes"
        )
    state, context, action, real = states(predictor, episodes)
    done = episodes.get(("next", "done"), None)
    if done is not None:
        alive[:, 1:] &= ~done[:, :-1].bool().reshape(len(done), -1).cummax(1).values.cpu()
    alive = alive.to(state.device)
    shown, unit = changes(state[alive], real[alive], dims)
    traj = predictor.model.rollout(
        state[:, 0], context[:, 0], action, propagation=TSInfinity(n_particles=n_particles)
    )
    parts = predictor.model.uncertainty(traj)
    mean, std = parts["mean"], (parts["epistemic_var"] + parts["aleatoric_var"]).sqrt()

    def size(what: torch.Tensor) -> torch.Tensor:
        """Return the root mean square ``[H]`` of ``[E, H, D]`` over the steps that count."""
        square = torch.where(alive, (what[..., shown] / unit).square().mean(-1), 0.0)
        return (square.sum(0) / alive.sum(0)).sqrt().float().cpu()

    figure = new_figure(6, 3.6)
    axis = figure.subplots()
    time = range(1, episodes.shape[1] + 1)
    axis.plot(time, size(mean - real), "o-", ms=3, color=BLUE, label="error of the mean")
    axis.plot(time, size(std), color=ORANGE, label="predicted std")
    axis.plot(time, size(state[:, :1] - real), color=GREY, ls="--", label="if nothing changed")
    axis.set_xlabel("steps ahead, open loop")
    axis.set_ylabel("std of a one-step change")
    axis.set_yscale("log")
    tidy(axis)
    axis.legend(fontsize=8, frameon=False)
    return figure
