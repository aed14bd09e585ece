"""Figures of runs: learning curves, predictions, skills and plans."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from tensordict import TensorDict

from layeredrl_torchrl import plots

BLUE, ORANGE, GREY = "#2a6fbb", "#d9722b", "#888888"


def _finish(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def learning_curve(
    rows: list[dict[str, float]],
    evaluation: float,
    path: Path,
    title: str,
    how: str = "planned in a model learned from scratch",
) -> None:
    """Plot the episodes' returns, the final evaluation and the model's NLL over real steps.

    Until the first episode ends, the returns so far are shown instead.
    """
    steps = np.array([row["env_steps"] for row in rows])
    ended = np.array([row["episodes"] for row in rows]) > 0
    returns = np.array([row["return"] for row in rows])
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5.5), sharex=True, height_ratios=(2, 1))
    if ended.any():
        label = "training episodes, where they ended"
        top.plot(steps[ended], returns[ended], "o-", color=BLUE, ms=5, lw=0.8, label=label)
    so_far = np.array([row["return_so_far"] for row in rows])
    if (~ended[1:] & (so_far[1:] > so_far[:-1])).any():
        # Only the part after the last end: each new episode starts at 0.
        last = int(np.flatnonzero(ended)[-1]) if ended.any() else 0
        label = "episodes that had not ended, so far"
        top.plot(steps[last:], so_far[last:], color=GREY, lw=1.2, label=label)
    if np.isfinite(evaluation):
        label = f"evaluation after training: {evaluation:.0f}"
        top.plot(steps[-1], evaluation, "*", color=ORANGE, ms=14, clip_on=False, label=label)
    top.set_ylabel("return")
    top.set_title(f"{title}: {how}", fontsize=11)
    top.legend(fontsize=8, frameon=False)
    nll = np.array([row.get("nll", np.nan) for row in rows])  # not of agents without a model
    bottom.plot(steps, nll, color=ORANGE)
    bottom.set_ylabel("model's error: NLL\n[nats a dimension]")
    if np.isnan(nll).all():
        bottom.text(0.5, 0.5, "no model", ha="center", va="center", transform=bottom.transAxes)
    bottom.set_xlabel("real environment steps")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    _finish(figure, path)


def prediction(
    predictor, played: TensorDict, path: Path, names: tuple[str, ...], horizon: int = 30
) -> None:
    """Plot an open-loop prediction of the longest part of `played [E, T]` without an end."""
    alive = ~played["next", "done"].squeeze(-1)
    lengths = alive.int().cumprod(-1).sum(-1) + 1
    episode = int(lengths.argmax())
    start = 10 if lengths[episode] > horizon + 10 else 0
    steps = min(horizon, int(lengths[episode]) - start)
    stretch = played[episode, start : start + steps]
    plots.plot_prediction(predictor, stretch, names=names).savefig(path, dpi=120)


def diagnostics(predictor, played: TensorDict, folder: Path, names: tuple[str, ...]) -> None:
    """Plot calibration, error by horizon and disagreement on experience `[E, T]`."""
    found = {
        "calibration": plots.plot_calibration(predictor, played, names=names),
        "error_by_horizon": plots.plot_error_by_horizon(predictor, played[:, :30]),
        "disagreement": plots.plot_disagreement(predictor, played, names=names),
    }
    for name, figure in found.items():
        figure.savefig(folder / f"{name}.png", dpi=120)


def _draw_maze(axis, maze) -> None:
    """Draw the walls of gymnasium-robotics' `maze`, in metres."""
    size = maze.maze_size_scaling
    for i, row in enumerate(maze.maze_map):
        for j, cell in enumerate(row):
            if cell == 1:
                x = (j + 0.5) * size - maze.x_map_center
                y = maze.y_map_center - (i + 0.5) * size
                corner = (x - size / 2, y - size / 2)
                axis.add_patch(plt.Rectangle(corner, size, size, color="#d5d5d5", lw=0))
    # Show half of the outer walls.
    x, y = maze.x_map_center - size / 2, maze.y_map_center - size / 2
    axis.set_xlim(-x, x)
    axis.set_ylim(-y, y)
    axis.set_aspect("equal")
    axis.set_xticks([])
    axis.set_yticks([])


def skill_fan(paths: np.ndarray, skills: np.ndarray, maze, path: Path, title: str) -> None:
    """Plot where skills `[n, 2]` lead from rest: `paths [n, T + 1, 2]`, in metres."""
    colors = plt.get_cmap("hsv")((np.arctan2(skills[:, 1], skills[:, 0]) / (2 * np.pi)) % 1.0)
    figure, (left, right, key) = plt.subplots(1, 3, figsize=(11, 4.2), width_ratios=(4, 4, 2))
    for walk, color in zip(paths, colors, strict=True):
        moved = walk - walk[0]
        left.plot(moved[:, 0], moved[:, 1], color=color, lw=1)
        left.plot(*moved[-1], "o", color=color, markersize=3)
        right.plot(walk[:, 0], walk[:, 1], color=color, lw=1)
        right.plot(*walk[-1], "o", color=color, markersize=3)
    left.set_aspect("equal")
    left.set_title("from where it began", fontsize=10)
    left.set_xlabel("x [m]")
    left.set_ylabel("y [m]")
    left.grid(alpha=0.3)
    left.spines[["top", "right"]].set_visible(False)
    _draw_maze(right, maze)
    right.set_title("in the maze", fontsize=10)
    key.scatter(skills[:, 0], skills[:, 1], color=colors, s=12)
    key.set_aspect("equal")
    key.set_title("the skill", fontsize=10)
    key.set_xlabel("$z_1$")
    key.set_ylabel("$z_2$")
    key.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    _finish(figure, path)


def maze_plans(
    paths: np.ndarray,
    goals: np.ndarray,
    reached: np.ndarray,
    plans: np.ndarray | None,
    step: int,
    maze,
    path: Path,
    title: str,
) -> None:
    """Plot episodes `[n, T, 2]` with their goals and the plans at their start.

    `plans [n, M, H + 1, 2]` are the places after each skill of `step` steps, predicted by each
    member.
    """
    n_columns = min(4, len(paths))
    n_rows = -(-len(paths) // n_columns)
    shape = len(maze.maze_map) / len(maze.maze_map[0])
    size = (max(2.7 * n_columns, 6.5), (2.6 * shape + 0.3) * n_rows + 0.7)
    figure, axes = plt.subplots(
        n_rows, n_columns, figsize=size, squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(paths) :]:
        axis.set_visible(False)
    for i, (axis, walk) in enumerate(zip(axes.flat, paths, strict=False)):
        _draw_maze(axis, maze)
        axis.add_patch(plt.Circle(goals[i], 0.45, color=ORANGE, alpha=0.25, lw=0))
        axis.plot(*goals[i], "*", color=ORANGE, markersize=11, zorder=5, label="goal")
        if plans is not None:
            for j, imagined in enumerate(plans[i]):
                label = "plan at the start, each member" if not j else None
                axis.plot(*imagined.T, ".--", color=GREY, lw=0.8, markersize=3, label=label)
        axis.plot(*walk.T, color=BLUE, lw=1.5, label="what happened, until the goal")
        if step > 1:
            ends = walk[::step]
            axis.plot(*ends.T, "o", color=BLUE, markersize=3.5, label="a skill ends")
        axis.plot(*walk[0], "s", color="black", markersize=5, zorder=5, label="start")
        axis.set_title("reached" if reached[i] else "not reached", fontsize=9)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.suptitle(title, fontsize=11)
    figure.legend(handles, labels, ncols=5, fontsize=8, loc="outside lower center", frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def success_curves(
    curves: dict[str, list[dict[str, float]]],
    final: dict[str, float],
    skill_steps: int,
    path: Path,
    title: str,
) -> None:
    """Plot each agent's share of episodes that reach their goal, over real steps."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5.5), sharex=True, height_ratios=(2, 1))
    for (name, rows), color in zip(curves.items(), (BLUE, ORANGE, "#3a923a"), strict=False):
        ended = [row for row in rows if row["episodes"]]
        steps = [row["env_steps"] for row in ended]
        top.plot(steps, [row["success"] for row in ended], "o-", color=color, ms=3, label=name)
        if name in final:
            label = f"{name}: {final[name]:.0%} of new goals at the end"
            top.plot(rows[-1]["env_steps"], final[name], "*", color=color, ms=14, label=label)
        reward = [row.get("skill_reward", np.nan) for row in rows]
        if not np.isnan(reward).all():
            bottom.plot([row["env_steps"] for row in rows], reward, color=color)
            for axis in (top, bottom):
                axis.axvspan(0, skill_steps, color=GREY, alpha=0.12, lw=0)
            text = "the hierarchy discovers skills"
            top.text(skill_steps / 2, 1.03, text, ha="center", fontsize=8)
    top.set_ylim(-0.02, 1.12)
    top.set_ylabel("episodes that\nreach their goal")
    top.set_title(title, fontsize=11)
    top.legend(fontsize=8, frameon=False)
    bottom.set_ylabel("reward of skills\n[nats]")
    bottom.set_xlabel("real environment steps")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    _finish(figure, path)
