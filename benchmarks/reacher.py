"""Reaching with an arm: how close runs on Reacher-Tip get to new targets, and what their skills do.

    python examples/skill_hierarchy.py --task Reacher-Tip ... --output output/reacher
    python benchmarks/reacher.py output/reacher/*

Repeats the evaluation of each run from its last checkpoint, with 100 new targets, and prints a
table; draws the skills and some episodes of a planner over skills.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from pictures import example_of, play_skills, restore
from tensordict import TensorDictBase

from layeredrl_torchrl import get_task
from layeredrl_torchrl.runs import Count, Natural, command

BLUE, ORANGE, GREY = "#2a6fbb", "#d9722b", "#888888"
POSTURES = ((0.4, 1.2), (2.4, -1.6), (-2.2, 1.9), (-0.7, -1.0))  # shoulder, elbow, rad
REACH = 0.21  # m, both links


@dataclass
class Config:
    """Evaluate runs on Reacher-Tip."""

    folders: tuple[Path, ...]
    """Folders of runs."""
    interrupt_after: Natural = 0
    """Real steps after which the planner may replace a skill; 0 for never."""
    episodes: Count = 100
    """Episodes per run, the first of its own evaluation."""
    picture: Path = Path("output/reacher_skills.png")
    """File for the picture of the last planner over skills."""


def restored(folder: Path) -> tuple[Any, Any, Any, Any]:
    """Return the example that made a run, its options, its task and its agent, as last saved."""
    found = example_of(folder)
    if found is None:
        raise SystemExit(f"{folder} holds no run")
    example, options = found
    if options.task != "Reacher-Tip":
        raise SystemExit(f"{folder} holds a run on {options.task}, expected one on Reacher-Tip")
    task = get_task(options.task)
    agent = example.make_agent(options, task, example.make_env(task, 1, 0))
    restore(folder, hierarchy=agent)
    return example, options, task, agent.eval()


@torch.no_grad()
def play(example: Any, options: Any, task: Any, agent: Any, episodes: int) -> TensorDictBase:
    """Play whole episodes ``[episodes, T]`` of the run's evaluation."""
    env = example.make_env(task, episodes, options.seed + 100_000)
    env.append_transform(agent.make_tensordict_primer())
    return env.rollout(task.horizon, agent)


def table_row(name: str, seed: int, played: TensorDictBase) -> str:
    """Return how many targets were reached, and how far away episodes end, as Markdown."""
    reached, seen = played["next", "success"].squeeze(-1), played["next", "observation"][:, -1]
    away = 100 * (seen[:, :2] - seen[:, 8:]).norm(dim=-1)
    first = torch.where(reached.any(-1), reached.int().argmax(-1) + 1.0, torch.nan).nanmedian()
    return (
        f"| {name} | {seed} | {100 * reached.any(-1).float().mean():.0f} % | "
        f"{100 * reached[:, -1].float().mean():.0f} % | "
        f"{100 * reached[:, -50:].all(-1).float().mean():.0f} % | "
        f"{away.mean():.1f} ({away.median():.1f}) | {first:.0f} | "
        f"{played['next', 'reward'].sum((1, 2)).mean():.0f} |"
    )


def draw_arm(axis: Any, seen: np.ndarray) -> None:
    """Draw the links in the state ``seen``, and the limit of their reach, in cm."""
    axis.add_patch(plt.Circle((0, 0), 100 * REACH, fill=False, color="#bbbbbb", lw=1, ls=":"))
    elbow = 10 * np.array([seen[2], seen[4]])
    links = np.stack([np.zeros(2), elbow, 100 * seen[:2]])
    axis.plot(*links.T, "-o", color="#c4c4c4", lw=5, ms=6, solid_capstyle="round", zorder=0)
    axis.set_xlim(-24, 24)
    axis.set_ylim(-24, 24)
    axis.set_xticks((-20, 0, 20))
    axis.set_yticks((-20, 0, 20))
    axis.set_aspect("equal")
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def draw(folder: Path, played: TensorDictBase, path: Path) -> None:
    """Draw where each skill leads from four postures, and below episodes with their first plans."""
    _, options, task, agent = restored(folder)
    top, level = agent.levels
    figure, axes = plt.subplots(
        2, 4, figsize=(11, 6.3), sharex=True, sharey=True, layout="constrained"
    )
    for axis, posture in zip(axes[0], POSTURES, strict=True):
        paths, skills = play_skills(options, task, level, lambda env, at=posture: pose(env, at))
        hue = torch.atan2(skills[:, 1], skills[:, 0]) / (2 * torch.pi) % 1.0
        draw_arm(axis, paths[0, 0].numpy())
        for walk, color in zip(100 * paths[..., :2], plt.get_cmap("hsv")(hue.numpy()), strict=True):
            axis.plot(*walk.T, color=color, lw=1)
            axis.plot(*walk[-1], "o", color=color, ms=3)
    key = axes[0, 0].inset_axes((0.0, 0.78, 0.22, 0.22))
    key.scatter(*skills.T, c=plt.get_cmap("hsv")(hue.numpy()), s=4)
    key.set_aspect("equal")
    key.axis("off")
    key.text(0, 0, "skill", ha="center", va="center", fontsize=7)
    data = played[: axes.shape[1]]
    start = top.planner.forget([len(data)]).set("observation", data["observation"][:, 0])
    with torch.no_grad():
        actions, _ = top.planner.plan(start)
        plan = top.predictor.rollout(data["observation"][:, 0], actions, deterministic=True)
    for i, axis in enumerate(axes[1]):
        seen = torch.cat([data["observation"][i, :1], data["next", "observation"][i]])
        reached = data["next", "success"][i, :, 0]
        last = int(reached.int().argmax()) + 1 if reached.any() else len(reached)
        draw_arm(axis, seen[0].numpy())
        for j, member in enumerate(plan["next", "state"][i, :, 0, :, :2]):
            way = 100 * torch.cat([seen[:1, :2], member])
            label = "plan at the start, each member" if not j else None
            axis.plot(*way.T, ".--", color=GREY, lw=0.8, ms=3, label=label)
        walk = 100 * seen[: last + 1, :2]
        axis.plot(*walk.T, color=BLUE, lw=1.5, label="tip, until it is there")
        axis.plot(*walk[:: options.duration].T, "o", color=BLUE, ms=3.5, label="a skill ends")
        target = 100 * seen[0, 8:]
        axis.add_patch(plt.Circle(target, 2, color=ORANGE, alpha=0.3, lw=0))
        axis.plot(*target, "*", color=ORANGE, ms=8, zorder=5, label="target, 2 cm around it")
        away = 100 * (seen[-1, :2] - seen[-1, 8:]).norm()
        there = f"there after {0.02 * last:.2f} s" if reached.any() else "not reached"
        axis.set_title(f"{there}, {away:.1f} cm off at the end", fontsize=8)
    for axis in axes[:, 0]:
        axis.set_ylabel("y [cm]", fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("x [cm]", fontsize=8)
    time = 0.02 * options.duration
    title = f"Where {time:.1f} s of each skill leads an arm's tip, from rest in four postures"
    figure.suptitle(f"{title}; below, plans over these skills to new targets", fontsize=11)
    handles, labels = axes[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=4, fontsize=8, loc="outside lower center", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"\nPicture: {path}")


def pose(env: Any, angles: tuple[float, float]) -> TensorDictBase:
    """Put all arms at rest in a posture."""
    data = env.reset()
    for row, one in zip(data["observation"], env.base_env._env.envs, strict=True):
        body = one.unwrapped
        body.set_state(np.array([*angles, *body.goal]), np.zeros(4))
        row[:] = torch.as_tensor(body._get_obs())
    return data


def main(config: Config) -> None:
    """Evaluate the runs, and draw the last planner over skills."""
    torch.set_num_threads(1)
    head = "agent | seed | reached | there at the end | in all of the last second"
    print(f"| {head} | cm off at the end, mean (median) | steps until there, median | return |")
    print("|---" * 8 + "|")
    drawn = None
    for folder in config.folders:
        example, options, task, agent = restored(folder)
        if len(agent.levels) > 1:
            agent.levels[1].interrupt_after = config.interrupt_after or None
        torch.manual_seed(options.seed)
        played = play(example, options, task, agent, config.episodes)
        print(table_row(options.agent, options.seed, played), flush=True)
        if len(agent.levels) > 1:
            drawn = folder, played
    if drawn:
        draw(*drawn, config.picture)


if __name__ == "__main__":
    command(main, Config, __doc__, needs=("matplotlib",))
