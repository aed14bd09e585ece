"""Far goals that alone pay: a planner over skills and flat agents, over seeds.

    python benchmarks/mazes.py                            # every agent, seeds 0 1 2
    python benchmarks/mazes.py --agents her --seeds 0
    python benchmarks/mazes.py --no-run                   # table and picture of what is there

A run that was cut off goes on from its last checkpoint, one that is complete is not run again.
Prints a table and draws success against real steps, both from the files in the output folder.
"""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from pictures import read_csv

from layeredrl_torchrl.runs import command, find_task

LANDMARKS = "skill_hierarchy --landmarks 0.3"
SKILL_STEPS = 30_000  # the default of the example
# How an agent is called, its color, and what differs from the defaults of its example.
AGENTS = {
    "hierarchy": ("planner over skills", "#2a6fbb", f"{LANDMARKS} --horizon 5"),
    "planner": (
        "planner over forces",
        "#3a9a5c",
        f"{LANDMARKS} --agent planner --horizon 15 --n-samples 64 --n-iterations 2 "
        "--model-updates-per-action 0.1",
    ),
    "her": ("SAC in hindsight", "#d9722b", "hindsight --hidden-size 128"),
    "sac": ("SAC", "#888888", "hindsight --hidden-size 128 --hindsight-share 0"),
}
EXAMPLES = Path(__file__).parents[1] / "examples"


@dataclass
class Config:
    """Reach far goals, over agents and seeds."""

    task: str = "PointMaze-Large-Sparse"
    """Name of the task, a point maze."""
    agents: tuple[str, ...] = tuple(AGENTS)
    """Which agents."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds."""
    total_env_steps: int = 60_000
    """Real steps of each agent."""
    run: bool = True
    """Whether what is missing is run."""
    output: Path = Path("output/mazes")
    """Folder with a folder for each task and seed, for its runs and the picture."""


def run(config: Config, agent: str, seed: int) -> None:
    """Let one agent learn, unless that is done; goes on where an earlier run was cut off."""
    parent = config.output / f"{config.task}-{seed}"
    if (parent / agent / "evaluation.csv").exists():
        return
    name, *options = AGENTS[agent][2].split()
    line = [sys.executable, str(EXAMPLES / f"{name}.py"), *options, "--task", config.task]
    line += ["--total-env-steps", str(config.total_env_steps), "--seed", str(seed)]
    line += ["--output", str(parent)]
    if any((parent / agent / "checkpoints").glob("checkpoint-*")):
        line.append("--resume")
    subprocess.run(line, check=True)


def success_of(folder: Path) -> float:
    """Share of evaluation episodes that reached their goal; NaN before the evaluation."""
    path = folder / "evaluation.csv"
    return fmean(row["success"] for row in read_csv(path)) if path.exists() else math.nan


def table(config: Config) -> None:
    """Print what the complete runs reached, as Markdown."""
    print("| agent | seed | real steps | success | minutes |")
    print("|---|---|---|---|---|")
    for agent in config.agents:
        for seed in config.seeds:
            folder = config.output / f"{config.task}-{seed}" / agent
            success = success_of(folder)
            if not math.isnan(success):
                last = read_csv(folder / "curve.csv")[-1]
                print(
                    f"| {AGENTS[agent][0]} | {seed} | {last['env_steps']:,.0f} | "
                    f"{100 * success:.0f} % | {last['seconds'] / 60:.0f} |"
                )


def picture(config: Config) -> None:
    """Draw the success of training episodes of all seeds, and of the final evaluations."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    for agent in config.agents:
        label, color, _ = AGENTS[agent]
        ends = []
        for seed in config.seeds:
            folder = config.output / f"{config.task}-{seed}" / agent
            if not (folder / "curve.csv").exists():
                continue
            rows, success = read_csv(folder / "curve.csv"), 100 * success_of(folder)
            points = [(0.0, 0.0)]
            points += [(row["env_steps"], 100 * row["success"]) for row in rows if row["episodes"]]
            axis.plot(*zip(*points, strict=True), color=color, lw=1.5, alpha=0.8)
            if not math.isnan(success):
                end = (rows[-1]["env_steps"], success)
                axis.plot(*zip(points[-1], end, strict=True), ":", color=color, lw=1.0)
                axis.plot(*end, "*", color=color, markersize=13, clip_on=False)
                ends.append(end)
        if ends:
            at = (ends[0][0], fmean(end[1] for end in ends))
            text = f"   {label}\n   {at[1]:.0f} %"
            axis.annotate(text, at, color=color, va="center", annotation_clip=False)
    if "hierarchy" in config.agents:
        axis.axvspan(0, SKILL_STEPS, color="#2a6fbb", alpha=0.06, lw=0)
        text = "skills are discovered, without a reward"
        axis.text(SKILL_STEPS / 2, 96, text, color="#2a6fbb", ha="center", fontsize=8)
    axis.set_ylim(0, 100)
    axis.set_xlim(0, config.total_env_steps)
    axis.set_xlabel("real environment steps")
    axis.set_ylabel("episodes that reach their goal [%]\n(star: 100 unseen starts and goals)")
    axis.set_title(f"{config.task}: only the goal pays")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    path = config.output / "mazes.png"
    figure.savefig(path, dpi=110, bbox_inches="tight")
    print(f"\nPicture: {path}")


def main(config: Config) -> None:
    """Run what is missing, print the table, draw the picture."""
    find_task(config.task, with_goals=True)
    for seed in config.seeds if config.run else ():
        for agent in config.agents:
            run(config, agent, seed)
    table(config)
    picture(config)


if __name__ == "__main__":
    command(main, Config, __doc__, needs=("matplotlib",))
