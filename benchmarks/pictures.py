"""Pictures of runs: learning curves, predictions, animations, skills and plans.

    python benchmarks/pictures.py output/learn_to_control
    python benchmarks/pictures.py output/skill_hierarchy/*      # also compares the agents

Of any example but `train_with_trainer.py`, `many_tasks.py` and `offline.py`. A run of
`planning_with_model.py` is loaded from its last checkpoint for a prediction, diagnostics and an
animation, one of `skill_hierarchy.py` for plans and skills, one of `hindsight.py` for paths.
"""

from __future__ import annotations

import csv
import ctypes
import importlib
import math
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads are slower, as networks are small
if sys.platform == "linux" and not {"MUJOCO_GL", "DISPLAY"} & os.environ.keys():
    # Without a screen MuJoCo renders through EGL, and fails on import if EGL is missing.
    try:
        ctypes.CDLL("libEGL.so.1")
    except OSError:
        pass
    else:
        os.environ["MUJOCO_GL"] = "egl"

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.envs import EnvBase

from layeredrl_torchrl import (
    PlannerLevel,
    SafeCheckpoint,
    SafeRotation,
    get_task,
    make_batched,
)
from layeredrl_torchrl.runs import RunOptions, command
from layeredrl_torchrl.runs._folder import read_settings

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
EXAMPLES = (
    "planning_with_model",
    "learn_to_control",
    "dyna_sac",
    "value_gradients",
    "hindsight",
    "skill_hierarchy",
)


@dataclass
class Config:
    """Draw pictures of runs."""

    folders: tuple[Path, ...]
    """Folders of runs."""
    if_any: bool = False
    """Skip folders without a run."""


def read_csv(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def example_of(folder: Path) -> tuple[object, RunOptions] | None:
    """Return the example that made a run, and its options; None without a run."""
    saved = read_settings(folder)
    if saved is None:
        return None
    for name in EXAMPLES:
        module = importlib.import_module(name)
        if {f.name for f in fields(module.Config)} == saved.keys():
            # Here, whatever they learned on.
            here = {"output": Path(saved["output"]), "device": "cpu"}
            return module, module.Config(**saved | here)
    raise SystemExit(f"{folder} is not of one of {EXAMPLES}")


def restore(folder: Path, **parts: object) -> None:
    """Load parts of the last checkpoint of a run."""
    if (
        SafeRotation(folder / "checkpoints", keep_last=2).load_latest(SafeCheckpoint(**parts))
        is None
    ):
        raise SystemExit(f"{folder} has no checkpoint yet")


def discount_of(agent: Any, options: Any) -> float:
    """Return the discount by which the critics of a restored run learned in the end."""
    has_changed = agent.counts["steps"] > getattr(agent, "quarter", math.inf)
    return agent.late_gamma if has_changed else options.gamma


def draw_curve(folder: Path, config: RunOptions) -> None:
    from figures import learning_curve

    rows, final = read_csv(folder / "curve.csv"), folder / "evaluation.csv"
    mean = np.mean([row["return"] for row in read_csv(final)]) if final.exists() else np.nan
    how = "planned in a model learned from scratch"
    if hasattr(config, "hindsight_share"):
        how = "SAC with goals in hindsight" if config.hindsight_share else "SAC"
    if hasattr(config, "imagined_share"):
        how = f"SAC on {'imagined' if config.imagined_share else 'real'} experience"
    if hasattr(config, "episode_steps"):
        how = "value gradients through a model learned from scratch"
    learning_curve(rows, float(mean), folder / "learning_curve.png", config.task, how)


@torch.no_grad()
def draw_prediction(folder: Path, example: object, config: RunOptions) -> None:
    """Draw the model's predictions and an animation, for `planning_with_model.py`."""
    from animation import animation
    from figures import diagnostics, prediction

    task = get_task(config.task)
    env = example.make_env(config, 5, config.seed + 10_000)
    predictor = example.make_predictor(config, env)
    restore(folder, predictor=predictor)
    policy = example.make_planner(config, predictor.eval())
    env.append_transform(policy.make_tensordict_primer())
    played = env.rollout(min(task.horizon, 100), policy, break_when_any_done=False)
    names = task.names_of(range(task.observation_dim))
    prediction(predictor, played, folder / "prediction.png", names)
    diagnostics(predictor, played, folder, names)
    print("Playing and drawing an animation: about a minute")
    animation(task, policy, folder / "policy.gif", config.seed + 20_000)


@torch.no_grad()
def draw_maze(folder: Path, example: object, config: RunOptions) -> None:
    """Draw the skills, and episodes with their first plans, for `skill_hierarchy.py`."""
    from figures import maze_plans, skill_fan

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
    places = played["observation"][..., :2].clone()
    places[played["episode_success"].squeeze(-1)] = torch.nan  # nothing after the goal
    maze_plans(
        places.numpy(),
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
        skill_fan(paths[..., :2].numpy(), chosen.numpy(), maze, folder / "skills.png", title)


def play_skills(
    config: RunOptions, task, level, begin=EnvBase.reset
) -> tuple[torch.Tensor, torch.Tensor]:
    """States `[n, duration + 1, D]` under skills `[n, 2]` on a circle, each from `begin(env)`."""
    n = 80
    angle = torch.arange(n) * (2 * torch.pi / n)
    skill = torch.stack([angle.cos(), angle.sin()], -1)
    env = make_batched(task, n, seed=config.seed + 200_000)
    data, states = begin(env), []
    for step in range(config.duration + 1):
        seen = data["observation"][:, list(task.state_dims)]
        states.append(seen)
        given = {"observation": seen, "input": skill, "n_actions": torch.full((n, 1), step)}
        data = env.step(data.set("action", level(TensorDict(given, [n]))["action"]))["next"]
    env.close()
    return torch.stack(states, 1), skill


def main(config: Config) -> None:
    """Draw all figures of each run."""
    from figures import success_curves

    torch.set_num_threads(1)
    agents: dict[str, Path] = {}
    skill_steps = 0
    for folder in config.folders:
        found = example_of(folder)
        if found is None:
            if not config.if_any and not folder.is_file() and folder.suffix != ".png":
                raise SystemExit(f"{folder} holds no run")
            continue
        example, options = found
        draw_curve(folder, options)
        if example.__name__ == "planning_with_model":
            draw_prediction(folder, example, options)
        if example.__name__ in ("skill_hierarchy", "hindsight"):
            if hasattr(get_task(options.task).make_gym().unwrapped, "maze"):
                draw_maze(folder, example, options)  # benchmarks/reacher.py draws the arm
            agents[options.agent] = folder
            skill_steps = max(skill_steps, getattr(options, "skill_steps", 0))
        print(f"Pictures: {folder}")
    if agents:
        final = {
            name: np.mean([row["success"] for row in read_csv(folder / "evaluation.csv")])
            for name, folder in agents.items()
            if (folder / "evaluation.csv").exists()
        }
        curves = {name: read_csv(folder / "curve.csv") for name, folder in agents.items()}
        path = next(iter(agents.values())).parent / "success.png"  # wherever they are now
        success_curves(curves, final, skill_steps, path, options.task)


if __name__ == "__main__":
    command(main, Config, __doc__, needs=("matplotlib", "imageio"))
