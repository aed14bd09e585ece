"""Control learned from scratch: runs an example over tasks and seeds.

    python benchmarks/control.py                              # planning, every task, seeds 0 1 2
    python benchmarks/control.py --example value_gradients    # the same by value gradients
    python benchmarks/control.py --task Reacher-v5 --seeds 0
    python benchmarks/control.py --no-run                     # table and picture of finished runs

An interrupted run continues from its last checkpoint; a complete run is not repeated. Prints a
table (mean return, lowest and highest episode, successes, minutes) and draws the curves of all
seeds, both from the files in the output folder.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np

from layeredrl_torchrl import get_task
from layeredrl_torchrl.runs import Count, Seed, command, find_task

# What differs from the examples' defaults.
OPTIONS = {
    "learn_to_control": {
        "InvertedPendulum-v5": "--n-envs 2",  # so that a full episode fits in 2,000 steps
        "CartPoleSwingUp": "--horizon 20",
        "Reacher-v5": "--horizon 15 --n-samples 200 --n-iterations 6 --no-use-value",
        "PointMaze-Open": "--horizon 20 --no-use-value --updates-per-step 1",
        "PointMaze-U": "--horizon 20 --no-use-value --updates-per-step 1",
        # With the default of 300 random steps, seed 1 reached a return of only 425.
        "HalfCheetah-v5": "--horizon 12 --n-samples 200 --hidden-size 128 --random-steps 5000",
    },
    "value_gradients": {
        "HalfCheetah-v5": "",
        "Hopper-v5": "--known-termination",
        "Walker2d-v5": "--known-termination",
        "InvertedPendulum-v5": "--total-env-steps 1000",
        "InvertedDoublePendulum-v5": "",
        "Swimmer-v5": "",
        "Pusher-v5": "",
    },
}
# Mean returns over seeds at 20,000 steps (from the result files of DHMBPO's authors, TMLR 4/2025).
PUBLISHED = {
    "HalfCheetah-v5": {"SAC": 4047.0, "DHMBPO": 5381.0},
    "Hopper-v5": {"SAC": 301.0, "DHMBPO": 2101.0},
    "Walker2d-v5": {"SAC": 221.0, "DHMBPO": 1486.0},
}
COLORS = ("#2a6fbb", "#d9722b", "#3a9a5c", "#8a5fbf", "#888888")
EXAMPLES = Path(__file__).parents[1] / "examples"


@dataclass
class Config:
    """Learn tasks from scratch, over seeds."""

    example: Literal["learn_to_control", "value_gradients"] = "learn_to_control"
    """Which example learns."""
    task: tuple[str, ...] = ()
    """Names of the tasks; by default all with options for the example."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Seeds."""
    eval_episodes: Count = 10
    """Episodes of the final evaluation."""
    device: str = "cpu"
    """Device of the networks."""
    threads: Count = 1
    """Threads that torch may use."""
    run: bool = True
    """Whether to make missing runs."""
    output: Path = Path("output/control")
    """Folder with a subfolder per example, for its runs and the picture."""

    def __post_init__(self) -> None:
        self.task = self.task or tuple(OPTIONS[self.example])
        self.output = self.output / self.example


def run(config: Config, task: str, seed: int) -> None:
    """Learn one task, unless that is done."""
    folder = config.output / f"{task}-{seed}"
    options = ["--task", task, "--seed", str(seed), "--output", str(folder)]
    options += ["--threads", str(config.threads), "--eval-episodes", str(config.eval_episodes)]
    options += ["--device", config.device, *OPTIONS[config.example].get(task, "").split()]
    learn(EXAMPLES / f"{config.example}.py", options, folder)


def learn(example: Path, options: list[str], folder: Path) -> None:
    """Run an example that writes to a folder, unless it has ended; goes on where it was cut off.

    Ctrl-C, which the example gets, too, lets it complete and save its batch.
    """
    if (folder / "evaluation.csv").exists():
        return
    resume = ["--resume"] * any((folder / "checkpoints").glob("checkpoint-*"))
    process = subprocess.Popen([sys.executable, str(example), *options, *resume])
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    if status:
        raise SystemExit(status)


def has_rows(path: Path) -> bool:
    """Whether a run has written to its curve, which is empty until its first batch."""
    return path.exists() and path.stat().st_size > 0


def read(path: Path) -> dict[str, np.ndarray]:
    """The columns of a CSV file."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def table(config: Config) -> None:
    """Print the results of complete runs, as Markdown."""
    print("| task | real steps | seed | mean return (lowest, highest) | success | minutes |")
    print("|---|---|---|---|---|---|")
    for task in config.task:
        for seed in config.seeds:
            folder = config.output / f"{task}-{seed}"
            if not (folder / "evaluation.csv").exists():
                continue
            episodes, curve = read(folder / "evaluation.csv"), read(folder / "curve.csv")
            returns = episodes["return"]
            success = f"{100 * fmean(episodes['success']):.0f} %" if "success" in episodes else ""
            print(
                f"| {task} | {curve['env_steps'][-1]:,.0f} | {seed} | {returns.mean():.2f} "
                f"({returns.min():.2f}, {returns.max():.2f}) | {success} | "
                f"{curve['seconds'][-1] / 60:.0f} |"
            )


def picture(config: Config) -> None:
    """Draw the returns of training episodes of all seeds, and their final evaluations."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    folders = {
        task: {
            seed: folder
            for seed in config.seeds
            if has_rows((folder := config.output / f"{task}-{seed}") / "curve.csv")
        }
        for task in config.task
    }
    folders = {task: runs for task, runs in folders.items() if runs}
    if not folders:
        raise SystemExit(f"{config.output} holds no runs; leave --no-run out to make them")
    n_columns = min(3, len(folders))
    n_rows = -(-len(folders) // n_columns)
    size = 4.2 * n_columns, 3.1 * n_rows + 0.3
    figure, axes = plt.subplots(
        n_rows, n_columns, figsize=size, squeeze=False, layout="constrained"
    )
    named: dict[str, Any] = {}
    for axis in axes.flat[len(folders) :]:
        axis.remove()
    for axis, (task, runs) in zip(axes.flat, folders.items(), strict=False):
        for seed, folder in runs.items():
            curve, color = read(folder / "curve.csv"), COLORS[seed % len(COLORS)]
            if "evaluation" in curve:
                shown, of = ~np.isnan(curve["evaluation"]), "evaluation"
            else:
                shown, of = curve["episodes"] > 0, "return"
            steps = curve["env_steps"][shown]
            axis.plot(steps, curve[of][shown], color=color, lw=1.3, label=f"seed {seed}")
            if (folder / "evaluation.csv").exists():
                final = read(folder / "evaluation.csv")["return"].mean()
                end = curve["env_steps"][-1]
                axis.plot(end, final, "*", color=color, markersize=11, clip_on=False)
                if shown.any():  # the last training episodes did not end
                    last = steps[-1], curve[of][shown][-1]
                    axis.plot(*zip(last, (end, final), strict=True), ":", color=color, lw=1)
        solved = get_task(task).solved_at
        if solved is not None:
            axis.axhline(solved, color="black", lw=0.8, ls=":", label=f"solved: {solved:g}")
        if config.example == "value_gradients":
            for (name, value), style in zip(
                PUBLISHED.get(task, {}).items(), (":", "--"), strict=False
            ):
                axis.axhline(value, color="black", lw=0.8, ls=style, label=f"{name}, published")
        axis.set_title(task, fontsize=10)
        axis.set_xlabel("real environment steps")
        axis.xaxis.set_major_locator(plt.MaxNLocator(5))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        lines, names = axis.get_legend_handles_labels()
        named = dict(zip(names, lines, strict=True)) | named
    for row in axes:
        what = "training episodes" if config.example == "learn_to_control" else "3 episodes"
        row[0].set_ylabel(f"return of {what}\n(star: evaluation after them)", fontsize=8)
    figure.legend(
        named.values(), named, loc="outside lower center", ncols=8, fontsize=8, frameon=False
    )
    path = config.output / "control.png"
    figure.savefig(path, dpi=110)
    print(f"\nCurves: {path}")


def main(config: Config) -> None:
    """Make missing runs, print the table, draw the picture."""
    for task in config.task:
        find_task(task)
        for seed in config.seeds if config.run else ():
            run(config, task, seed)
    table(config)
    picture(config)


if __name__ == "__main__":
    command(main, Config, __doc__, needs=("matplotlib",))
