"""The pictures of runs: learning curves, predictions, animations, skills and plans.

    python benchmarks/pictures.py output/learn_to_control
    python benchmarks/pictures.py output/skill_hierarchy/*      # also the agents beside each other

Of any example but `train_with_trainer.py`. A run of `planning_with_model.py` is loaded from its
last checkpoint for a prediction and an animation, one of `skill_hierarchy.py` for plans and skills.
"""

from __future__ import annotations

import csv
import ctypes
import importlib
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

if sys.platform == "linux" and not {"MUJOCO_GL", "DISPLAY"} & os.environ.keys():
    # Without a screen MuJoCo renders through EGL; it fails on import where told to and EGL is not
    # there, so it is told only where it is.
    try:
        ctypes.CDLL("libEGL.so.1")
    except OSError:
        pass
    else:
        os.environ["MUJOCO_GL"] = "egl"

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from tensordict import TensorDict

from layeredrl_torchrl import (
    PlannerLevel,
    SafeCheckpoint,
    SafeRotation,
    TSInfinity,
    get_task,
    make_batched,
)
from layeredrl_torchrl.runs import RunOptions
from layeredrl_torchrl.runs.options import read_settings

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
EXAMPLES = (
    "planning_with_model",
    "learn_to_control",
    "dyna_sac",
    "value_gradients",
    "skill_hierarchy",
)
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
    """Returns of episodes that ended and that go on, and the model's fit, against real steps."""
    steps = np.array([row["env_steps"] for row in rows])
    ended = np.array([row["episodes"] for row in rows]) > 0
    returns = np.array([row["return"] for row in rows])
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5.5), sharex=True, height_ratios=(2, 1))
    so_far = [row["return_so_far"] for row in rows]
    top.plot(steps, so_far, color=GREY, lw=1.2, label="episodes under way, return so far")
    top.plot(
        steps[ended], returns[ended], "o", color=BLUE, markersize=5, label="episodes that ended"
    )
    top.plot(
        steps[-1],
        evaluation,
        "*",
        color=ORANGE,
        markersize=14,
        clip_on=False,
        label=f"final evaluation: {evaluation:.0f}",
    )
    top.set_ylabel("return")
    top.set_title(f"{title}: {how}", fontsize=11)
    top.legend(fontsize=8, frameon=False)
    nll = np.array([row["nll"] for row in rows])
    bottom.plot(steps, nll, color=ORANGE)
    bottom.set_ylabel("model's NLL\n[nats per dimension]")
    if np.isnan(nll).all():
        bottom.text(0.5, 0.5, "no model", ha="center", va="center", transform=bottom.transAxes)
    bottom.set_xlabel("real environment steps")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    _finish(figure, path)


@torch.no_grad()
def prediction(predictor, played: TensorDict, path: Path, title: str, horizon: int = 40) -> None:
    """Open-loop prediction from one real observation against what really happened.

    `played` is experience `[E, T]`; the longest unbroken stretch of its first steps is shown.
    """
    alive = ~played["next", "done"].squeeze(-1)
    lengths = alive.int().cumprod(-1).sum(-1) + 1
    episode = int(lengths.argmax())
    start = 10 if lengths[episode] > horizon + 10 else 0
    steps = min(horizon, int(lengths[episode]) - start)
    real = played[episode, start : start + steps]
    sampled = TSInfinity(n_particles=50)
    traj = predictor.rollout(real["observation"][0], real["action"], propagation=sampled)
    state, _ = predictor.encode(real["next", "observation"])
    parts = predictor.model.uncertainty(traj)
    mean = parts["mean"].numpy()
    epistemic = parts["epistemic_var"].numpy()
    total = epistemic + parts["aleatoric_var"].numpy()
    # The dimensions that move most, in units of what they do in this stretch.
    shown = state.std(0).argsort(descending=True)[:4].sort().values.tolist()
    time = np.arange(1, steps + 1)
    figure, axes = plt.subplots(len(shown), 1, figsize=(7, 1.8 * len(shown) + 0.8), sharex=True)
    for axis, d in zip(np.atleast_1d(axes), shown, strict=True):
        for variance, alpha, label in (
            (total, 0.2, "± 2 std, all particles"),
            (epistemic, 0.35, "± 2 std between members"),
        ):
            width = 2 * np.sqrt(variance[:, d])
            axis.fill_between(
                time,
                mean[:, d] - width,
                mean[:, d] + width,
                color=BLUE,
                alpha=alpha,
                lw=0,
                label=label,
            )
        axis.plot(time, mean[:, d], color=BLUE, label="predicted mean")
        axis.plot(time, state[:, d], color="black", lw=1.2, ls="--", label="real")
        axis.set_ylabel(f"state {d}")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        low, high = float(state[:, d].min()), float(state[:, d].max())
        margin = 1.0 * max(high - low, 1e-3)
        axis.set_ylim(low - margin, high + margin)
    axes = np.atleast_1d(axes)
    axes[0].legend(
        fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False
    )
    axes[-1].set_xlabel(f"steps ahead, open loop ({title})")
    _finish(figure, path)


@torch.no_grad()
def animation(task, policy, path: Path, seed: int, max_steps: int = 150) -> None:
    """An animated picture of one episode; says in one line why where MuJoCo cannot render."""
    import imageio

    try:
        env = task.make(seed=seed, render_mode="rgb_array")
        env.append_transform(policy.make_tensordict_primer())
        data, frames = env.reset(), []
        for _ in range(max_steps):
            frames.append(env.base_env._env.render()[::2, ::2])
            data = env.step(policy(data))["next"]
            if data["done"].any():
                break
    except Exception as error:  # noqa: BLE001 - each rendering backend fails in its own way
        backend = os.environ.get("MUJOCO_GL", "not set")
        reason = (str(error).splitlines() or [""])[0]
        print(
            f"No animation: MuJoCo cannot render here ({type(error).__name__}: {reason}; "
            f"MUJOCO_GL is {backend}, try egl or osmesa)"
        )
        return
    env.close()
    imageio.mimsave(path, frames[::2], duration=40, loop=0)


def _draw_maze(axis, maze) -> None:
    """The walls of gymnasium-robotics' `maze`, in metres."""
    size = maze.maze_size_scaling
    for i, row in enumerate(maze.maze_map):
        for j, cell in enumerate(row):
            if cell == 1:
                x = (j + 0.5) * size - maze.x_map_center
                y = maze.y_map_center - (i + 0.5) * size
                corner = (x - size / 2, y - size / 2)
                axis.add_patch(plt.Rectangle(corner, size, size, color="#d5d5d5", lw=0))
    # Of the outer walls, half.
    x, y = maze.x_map_center - size / 2, maze.y_map_center - size / 2
    axis.set_xlim(-x, x)
    axis.set_ylim(-y, y)
    axis.set_aspect("equal")
    axis.set_xticks([])
    axis.set_yticks([])


def skill_fan(paths: np.ndarray, skills: np.ndarray, maze, path: Path, title: str) -> None:
    """Where skills lead from rest: `paths [n, T + 1, 2]` in metres of the `skills [n, 2]`."""
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
    """Episodes `[n, T, 2]` with their goals, and what was planned at their start.

    `plans [n, M, H + 1, 2]` is each member's idea of the places after each skill of `step` steps.
    """
    n_columns = min(4, len(paths))
    n_rows = -(-len(paths) // n_columns)
    size = (max(2.7 * n_columns, 6.5), 2.9 * n_rows + 0.7)
    figure, axes = plt.subplots(
        n_rows, n_columns, figsize=size, squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(paths) :]:
        axis.set_visible(False)
    for i, (axis, walk) in enumerate(zip(axes.flat, paths, strict=False)):
        _draw_maze(axis, maze)
        axis.add_patch(plt.Circle(goals[i], 0.45, color=ORANGE, alpha=0.25, lw=0))
        axis.plot(*goals[i], "*", color=ORANGE, markersize=11, label="goal")
        if plans is not None:
            for j, imagined in enumerate(plans[i]):
                label = "plan at the start, each member" if not j else None
                axis.plot(*imagined.T, ".--", color=GREY, lw=0.8, markersize=3, label=label)
        axis.plot(*walk.T, color=BLUE, lw=1.5, label="what happened")
        if step > 1:
            ends = walk[::step]
            axis.plot(*ends.T, "o", color=BLUE, markersize=3.5, label="a skill ends")
        axis.plot(*walk[0], "s", color="black", markersize=5, label="start")
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
    """Share of the episodes that reached their goal against real steps, for each agent."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5.5), sharex=True, height_ratios=(2, 1))
    for (name, rows), color in zip(curves.items(), (BLUE, ORANGE, "#3a923a"), strict=False):
        ended = [row for row in rows if row["episodes"]]
        steps = [row["env_steps"] for row in ended]
        top.plot(steps, [row["success"] for row in ended], "o-", color=color, ms=3, label=name)
        if name in final:
            label = f"{name}: {final[name]:.0%} of new goals at the end"
            top.plot(rows[-1]["env_steps"], final[name], "*", color=color, ms=14, label=label)
        reward = [row["skill_reward"] for row in rows]
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


# -- runs ----------------------------------------------------------------------------------------


@dataclass
class Config:
    """Draw runs."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs."""
    if_any: bool = False
    """Say nothing of folders that hold no run."""


def read_csv(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def example_of(folder: Path) -> tuple[object, RunOptions] | None:
    """The example that made a run, and its options; None where there is no run."""
    saved = read_settings(folder)
    if saved is None:
        return None
    for name in EXAMPLES:
        module = importlib.import_module(name)
        if {f.name for f in fields(module.Config)} == saved.keys():
            return module, module.Config(**saved | {"output": Path(saved["output"])})
    raise SystemExit(f"{folder} is not of one of {EXAMPLES}")


def restore(folder: Path, **parts: object) -> None:
    """Load parts of the last checkpoint of a run."""
    if (
        SafeRotation(folder / "checkpoints", keep_last=2).load_latest(SafeCheckpoint(**parts))
        is None
    ):
        raise SystemExit(f"{folder} has no checkpoint yet")


def draw_curve(folder: Path, config: RunOptions) -> None:
    rows, final = read_csv(folder / "curve.csv"), folder / "evaluation.csv"
    mean = np.mean([row["return"] for row in read_csv(final)]) if final.exists() else np.nan
    how = "planned in a model learned from scratch"
    if hasattr(config, "imagined_share"):
        how = f"SAC on {'imagined' if config.imagined_share else 'real'} experience"
    if hasattr(config, "episode_steps"):
        how = "value gradients through a model learned from scratch"
    learning_curve(rows, float(mean), folder / "learning_curve.png", config.task, how)


@torch.no_grad()
def draw_prediction(folder: Path, example: object, config: RunOptions) -> None:
    """A prediction and an animation, of `planning_with_model.py`."""
    task = get_task(config.task)
    env = example.make_env(config, 5, config.seed + 10_000)
    predictor = example.make_predictor(config, env)
    restore(folder, predictor=predictor)
    policy = example.make_planner(config, predictor.eval())
    env.append_transform(policy.make_tensordict_primer())
    played = env.rollout(min(task.horizon, 100), policy, break_when_any_done=False)
    prediction(predictor, played, folder / "prediction.png", config.task)
    animation(task, policy, folder / "policy.gif", config.seed + 20_000)


@torch.no_grad()
def draw_maze(folder: Path, example: object, config: RunOptions) -> None:
    """Episodes with the plans at their start, and the skills, of `skill_hierarchy.py`."""
    task = get_task(config.task)
    env = example.make_env(task, 8, config.seed + 100_000)
    agent = example.make_agent(config, task, env)
    restore(folder, hierarchy=agent)
    env.append_transform(agent.eval().make_tensordict_primer())
    played = env.rollout(task.horizon, agent)
    maze, top, first = task.make_gym().unwrapped.maze, agent.levels[0], played[:, 0]
    plans = None
    if isinstance(top, PlannerLevel):
        start = top.planner.forget([len(first)]).set("observation", first["observation"])
        actions, _ = top.planner.plan(start)
        imagined = top.predictor.rollout(first["observation"], actions, deterministic=True)
        reached = imagined["next", "state"][:, :, 0, :, :2]
        begin = first["observation"][:, None, None, :2].expand(-1, reached.shape[1], 1, 2)
        plans = torch.cat([begin, reached], 2).numpy()
    skills = len(agent.levels) > 1
    maze_plans(
        played["observation"][..., :2].numpy(),
        first["observation"][:, list(task.context_dims)].numpy(),
        played["next", "episode_success"][:, -1, 0].numpy(),
        plans,
        config.duration if skills else 1,
        maze,
        folder / "plans.png",
        f"{config.task}: new starts and goals ({config.agent})",
    )
    if skills:
        paths, chosen = play_skills(config, task, agent.levels[-1])
        title = f"{config.task}: what {config.duration} steps of each skill do, from rest"
        skill_fan(paths.numpy(), chosen.numpy(), maze, folder / "skills.png", title)


def play_skills(config: RunOptions, task, level) -> tuple[torch.Tensor, torch.Tensor]:
    """Places `[n, duration + 1, 2]` under skills `[n, 2]` on a circle, each from rest."""
    n = 80
    angle = torch.arange(n) * (2 * torch.pi / n)
    skill = torch.stack([angle.cos(), angle.sin()], -1)
    env = make_batched(task, n, seed=config.seed + 200_000)
    data, places = env.reset(), []
    for step in range(config.duration + 1):
        seen = data["observation"][:, list(task.state_dims)]
        places.append(seen[:, :2])
        given = {"observation": seen, "input": skill, "n_actions": torch.full((n, 1), step)}
        data = env.step(data.set("action", level(TensorDict(given, [n]))["action"]))["next"]
    env.close()
    return torch.stack(places, 1), skill


def main(config: Config) -> None:
    """Draw all that there is to be drawn of each run."""
    agents: dict[str, Path] = {}
    for folder in config.folders:
        found = example_of(folder)
        if found is None:
            if not config.if_any and folder.is_dir() and folder.suffix != ".png":
                raise SystemExit(f"{folder} holds no run")
            continue
        example, options = found
        draw_curve(folder, options)
        if example.__name__ == "planning_with_model":
            draw_prediction(folder, example, options)
        if example.__name__ == "skill_hierarchy":
            draw_maze(folder, example, options)
            agents[options.agent] = folder
        print(f"Pictures: {folder}")
    if agents:
        final = {
            name: np.mean([row["success"] for row in read_csv(folder / "evaluation.csv")])
            for name, folder in agents.items()
            if (folder / "evaluation.csv").exists()
        }
        curves = {name: read_csv(folder / "curve.csv") for name, folder in agents.items()}
        path = options.output / "success.png"
        success_curves(curves, final, options.skill_steps, path, options.task)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
