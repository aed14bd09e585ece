"""Distant goals, with a reward only at the goal: compares a planner over skills with flat agents.

    python benchmarks/mazes.py                            # every agent, seeds 0 1 2
    python benchmarks/mazes.py --agents her --seeds 0
    python benchmarks/mazes.py --no-run                   # table and picture of finished runs
    python benchmarks/mazes.py --no-run --curves benchmarks/curves/mazes.csv --output docs

An interrupted run continues from its last checkpoint; a complete run is not repeated. Prints a
table and plots success over real steps, both from a small file of curves, to which the runs in the
output folder are added.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from control import EXAMPLES, learn
from pictures import read_csv

from layeredrl_torchrl.runs import Count, RunError, Seed, command, find_task
from layeredrl_torchrl.runs._files import write_whole

FORCES = "skill_hierarchy --agent planner --horizon 15 --n-samples 64 --n-iterations 2"


class Agent(NamedTuple):
    """One line of the table: its label and color, and its command."""

    label: str
    color: str
    example: str  # with options
    folder: str  # for the example's files


AGENTS = {
    "hierarchy": Agent(
        "planner over skills,\n   learned on the way to new places",
        "#2a6fbb",
        "skill_hierarchy --landmarks 0.3 --horizon 5 --random-prob 0.1",
        "hierarchy",
    ),
    "hierarchy_random": Agent(
        "planner over skills,\n   random while they are learned",
        "#79aadd",
        "skill_hierarchy --landmarks 0.3 --horizon 5",
        "random/hierarchy",
    ),
    "planner": Agent(
        "planner over forces,\n   landmarks",
        "#3a9a5c",
        f"{FORCES} --landmarks 0.3 --model-updates-per-action 0.1",
        "planner",
    ),
    "planner_alone": Agent(
        "planner over forces",
        "#8e5ea2",
        f"{FORCES} --model-updates-per-action 0.1",
        "alone/planner",
    ),
    "her": Agent("SAC in hindsight", "#d9722b", "hindsight --hidden-size 128", "her"),
    "sac": Agent("SAC", "#888888", "hindsight --hidden-size 128 --hindsight-share 0", "sac"),
}
SKILL_STEPS = 30_000  # the default of the example
COLUMNS = ("agent", "seed", "what", "env_steps", "success", "minutes")


@dataclass
class Config:
    """Reach distant goals, over agents and seeds."""

    task: str = "PointMaze-Large-Sparse"
    """Name of the task, a point maze."""
    agents: tuple[str, ...] = tuple(AGENTS)
    """Names of the agents."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Seeds."""
    total_env_steps: Count = 60_000
    """Real steps of each agent."""
    run: bool = True
    """Whether to make missing runs."""
    output: Path = Path("output/mazes")
    """Folder with a subfolder per task and seed for its runs, and the picture."""
    curves: Path | None = None
    """File with the curves of one task; by default in the output folder."""


def folder_of(config: Config, agent: str, seed: int) -> Path:
    return config.output / f"{config.task}-{seed}" / AGENTS[agent].folder


def run(config: Config, agent: str, seed: int) -> None:
    """Let one agent learn, unless that is done."""
    folder = folder_of(config, agent, seed)
    name, *options = AGENTS[agent].example.split()
    options += ["--task", config.task, "--total-env-steps", str(config.total_env_steps)]
    options += ["--seed", str(seed), "--output", str(folder.parent)]
    learn(EXAMPLES / f"{name}.py", options, folder)


def rows_of(config: Config, agent: str, seed: int) -> list[dict[str, str]]:
    """Rows of a complete run: its training episodes, then the evaluation; else none."""
    folder = folder_of(config, agent, seed)
    if not (folder / "evaluation.csv").exists():
        return []
    rows = read_csv(folder / "curve.csv")
    found = [("training", row, row["success"]) for row in rows if row["episodes"]]
    success = fmean(row["success"] for row in read_csv(folder / "evaluation.csv"))
    return [
        {
            "agent": agent,
            "seed": str(seed),
            "what": what,
            "env_steps": f"{row['env_steps']:.0f}",
            "success": f"{share:.4g}",
            "minutes": f"{row['seconds'] / 60:.0f}",
        }
        for what, row, share in [*found, ("evaluation", rows[-1], success)]
    ]


def curves(config: Config) -> dict[tuple[str, int], list[dict[str, str]]]:
    """Add the finished runs to the file of curves, and return all curves."""
    path = config.curves or config.output / f"{config.task}.csv"
    runs: dict[tuple[str, int], list[dict[str, str]]] = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                runs.setdefault((row["agent"], int(row["seed"])), []).append(row)
    new = {(a, s): rows_of(config, a, s) for a in config.agents for s in config.seeds}
    runs |= {key: rows for key, rows in new.items() if rows}
    if any(new.values()):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for agent, seed in sorted(runs):
            writer.writerows(runs[agent, seed])
        write_whole(path, text.getvalue())
    return {(a, s): runs[a, s] for a in config.agents for s in config.seeds if (a, s) in runs}


def table(runs: dict[tuple[str, int], list[dict[str, str]]]) -> None:
    """Print the results of complete runs, as Markdown."""
    print("| agent | seed | real steps | success | minutes |")
    print("|---|---|---|---|---|")
    for (agent, seed), rows in runs.items():
        end = rows[-1]
        print(
            f"| {' '.join(AGENTS[agent].label.split())} | {seed} | {int(end['env_steps']):,} | "
            f"{100 * float(end['success']):.0f} % | {end['minutes']} |"
        )


def picture(config: Config, runs: dict[tuple[str, int], list[dict[str, str]]]) -> None:
    """Draw the success of training episodes of all seeds, and of the final evaluations."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    labels = []
    for agent in config.agents:
        label, color = AGENTS[agent][:2]
        ends = {}
        for seed, rows in ((seed, rows) for (of, seed), rows in runs.items() if of == agent):
            points = [(int(row["env_steps"]), 100 * float(row["success"])) for row in rows]
            if len(points) > 1:
                trained = zip(*points[:-1], strict=True)
                axis.plot(*trained, "o-", color=color, lw=1.5, ms=3.5, alpha=0.8)
                axis.plot(*zip(*points[-2:], strict=True), ":", color=color, lw=1.2)
            axis.plot(*points[-1], "*", color=color, markersize=13, clip_on=False)
            ends[seed] = points[-1][1]
        if ends:
            reached = ", ".join(f"{end:.0f}" for end in ends.values())
            seeds = f"seed{'s' if len(ends) > 1 else ''} {', '.join(map(str, ends))}"
            text = f"   {label}: {reached} % ({seeds})"
            labels.append((fmean(ends.values()), text, color))
    highest = 104.0
    for mean, text, color in sorted(labels, reverse=True):  # without overlaps
        at = (config.total_env_steps, min(mean, highest))
        axis.annotate(text, at, color=color, va="center", fontsize=9, annotation_clip=False)
        highest = at[1] - 10.0
    if any(agent == "hierarchy" for agent, _ in runs):
        axis.axvspan(0, SKILL_STEPS, color="#2a6fbb", alpha=0.06, lw=0)
        text = "planner over skills: these are discovered,\nwithout a reward"
        axis.text(SKILL_STEPS / 2, 92, text, color="#2a6fbb", ha="center", fontsize=8)
    axis.set_ylim(0, 100)
    axis.set_xlim(0, config.total_env_steps)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_xlabel("real environment steps")
    axis.set_ylabel("episodes that reach their goal [%]")
    title = f"{config.task}: only the goal pays\n"
    axis.set_title(title, fontsize=11)
    how = "dots: training episodes, where they end; stars: 100 unseen starts and goals, one a seed"
    axis.text(0.5, 1.02, how, transform=axis.transAxes, ha="center", fontsize=8, color="#555555")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    config.output.mkdir(parents=True, exist_ok=True)
    path = config.output / "mazes.png"
    figure.savefig(path, dpi=110, bbox_inches="tight")
    print(f"\nPicture: {path}")


def main(config: Config) -> None:
    """Make missing runs, print the table, draw the picture."""
    find_task(config.task, with_goals=True)
    for agent in config.agents:
        if agent not in AGENTS:
            raise RunError(f"--agents: {agent!r} is none of {', '.join(AGENTS)}")
    for seed in config.seeds if config.run else ():
        for agent in config.agents:
            run(config, agent, seed)
    runs = curves(config)
    if not runs:
        raise RunError(f"{config.output} holds no complete runs; leave --no-run out to make them")
    table(runs)
    picture(config, runs)


if __name__ == "__main__":
    command(main, Config, __doc__, needs=("matplotlib",))
