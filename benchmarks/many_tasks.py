"""The jobs of `examples/many_tasks.py`: skills learned without them, and agents to compare.

    python benchmarks/many_tasks.py --seed SEED
    python benchmarks/many_tasks.py --seed SEED --no-run    # table of finished runs

Makes the missing runs: the example; a planner over forces, in a model of the same real steps,
without and with the landmarks; SAC on each job, with as many real steps per job as the example has
in total. Prints the mean returns.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from layeredrl_torchrl import (
    Hierarchy,
    ModelFreeLevel,
    SACLearner,
    SafeCheckpoint,
    SafeRotation,
    runs,
)
from layeredrl_torchrl.nets import Landmarks
from layeredrl_torchrl.runs._files import write_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import many_tasks as example

AGENTS = {
    "skills": "planner over skills",
    "forces": "planner over forces",
    "forces_ways": "planner over forces, with landmarks",
    "sac": "SAC on each",
}


@dataclass
class Config:
    """Do four jobs."""

    seed: runs.Seed = 0
    """Seed of everything random."""
    total_env_steps: runs.Count = 40_000
    """Real steps of the example, and of SAC for each job."""
    eval_episodes: runs.Count = 20
    """Episodes of each evaluation."""
    run: bool = True
    """Whether to make missing runs."""
    output: Path = Path("output/many_tasks_compared")
    """Folder with a subfolder per seed."""


def run_options(config: Config, folder: Path) -> example.Config:
    """Return the options of a run in a folder; an interrupted run continues."""
    return example.Config(
        seed=config.seed,
        total_env_steps=config.total_env_steps,
        eval_episodes=config.eval_episodes,
        output=folder,
        resume=any((folder / "checkpoints").glob("checkpoint-*")),
    )


def learn_forces(options: example.Config, skills: Path) -> tuple[object, Landmarks]:
    """Learn a model of single steps from the example's data; return it with the landmarks."""
    env = example.make_env(example.JOBS["reach"], options.n_envs, options.seed)
    level = example.make_skills(options)
    top = example.make_planner(example.FACTORY, options)
    agent = Hierarchy([top, level], env, observation_maps=[None, example.STATE])
    ways = Landmarks(2, radius=0.3)
    parts = SafeCheckpoint(**agent.parts(), ways=ways)
    SafeRotation(skills / "checkpoints", keep_last=2).load_latest(parts)
    rows = level.buffer[:]
    data = rows.select("action", ("next", "terminated"), ("next", "done"))
    for key in ("observation", ("next", "observation")):
        data[key] = torch.nn.functional.pad(rows[key], (0, len(example.CONTEXT)))
    data["next", "reward"] = torch.zeros(len(rows), 1)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(len(data)))
    buffer.extend(TensorDict(data.to_dict(), [len(data)]))
    predictor = example.FACTORY(env.observation_spec_unbatched, env.action_spec_unbatched)
    predictor.learn(buffer, 8000, 64, 256, len(data))
    return predictor, ways


def plan_forces(config: Config, folder: Path) -> None:
    """Do the jobs by plans of forces, at each step in the time that a plan of skills takes."""
    agents = (("forces", False), ("forces_ways", True))
    missing = [
        (path, sees, job)
        for agent, sees in agents
        for name, job in example.JOBS.items()
        if not (path := folder / agent / f"evaluation_{name}.csv").exists()
    ]
    if not missing:
        return
    torch.manual_seed(config.seed)
    torch.set_num_threads(1)
    options, discount = run_options(config, folder / "skills"), 0.99
    predictor, ways = learn_forces(options, folder / "skills")
    for path, sees, job in missing:
        predictor.rew_func, predictor.term_func = job.reward, ways.is_strange
        predictor.val_func = example.no_reward
        if sees:
            predictor.val_func = ways.value_of(job.reward, speed=0.025, discount=discount)
        env = example.make_env(job, config.eval_episodes, config.seed + 100_000)
        top = example.make_planner(lambda *_: predictor, options, discount=discount)
        policy = Hierarchy([top], env).eval()
        env.append_transform(policy.make_tensordict_primer())
        returns = runs.play_episodes(env, policy)["episode_reward"].flatten().tolist()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, ["return"], ([value] for value in returns))


def learn_job(config: Config, folder: Path, name: str) -> None:
    """Learn one job by SAC."""
    options, job = run_options(config, folder / "sac" / name), example.JOBS[name]
    with runs.Run(options, config.total_env_steps) as run:
        env = example.make_env(job, options.n_envs, config.seed)
        sizes = {"hidden_sizes": (128, 128), "lr": 1e-3, "tau": 0.01, "alpha_init": 0.1}
        first = {"n_initial_random_steps": options.steps_per_batch, "updates_per_step": 0.5}
        level = ModelFreeLevel(learner_factory=partial(SACLearner, **sizes), **first)
        agent = Hierarchy([level], env)
        run.keep(**agent.parts())
        for data in run.collect(env, agent):
            agent.learn(data)
            run.log(run.returns(data))
        env = example.make_env(job, config.eval_episodes, config.seed + 100_000)
        env.append_transform(agent.make_tensordict_primer())
        run.report(runs.play_episodes(env, agent.eval()), how=name)


def table(folder: Path) -> None:
    """Print the mean returns of finished runs, as Markdown."""
    print(f"| agent | {' | '.join(example.JOBS)} |")
    print("|---|" + "---|" * len(example.JOBS))
    for agent, label in AGENTS.items():
        cells = []
        for name in example.JOBS:
            inside = folder / agent / name if agent == "sac" else folder / agent
            path = inside / f"evaluation_{name}.csv"
            if path.exists():
                with path.open(newline="") as file:
                    mean = fmean(float(row["return"]) for row in csv.DictReader(file))
                cells.append(f"{mean:.1f}")
            else:
                cells.append("")
        print(f"| {label} | {' | '.join(cells)} |")


def main(config: Config) -> None:
    """Make missing runs, print the table."""
    folder = config.output / str(config.seed)
    if config.run:
        last = list(example.JOBS)[-1]
        if not (folder / "skills" / f"evaluation_{last}.csv").exists():
            example.main(run_options(config, folder / "skills"))
        for name in example.JOBS:
            if not (folder / "sac" / name / f"evaluation_{name}.csv").exists():
                learn_job(config, folder, name)
        plan_forces(config, folder)
    table(folder)


if __name__ == "__main__":
    runs.command(main, Config, __doc__)
