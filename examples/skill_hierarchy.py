"""Discover skills without any reward, then plan over them to reach goals never seen before.

Two levels in a point maze: the lower one learns, from nothing but what the upper one's model can
tell apart, skills of a fixed duration; the upper one plans in that model which skills lead to the
goal. `--agent` runs two flat agents on the same task for comparison; the learning curves of all
that lie below one output folder are drawn in one picture.

    python examples/skill_hierarchy.py
    python examples/skill_hierarchy.py --agent planner
    python examples/skill_hierarchy.py --agent sac
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from enum import Enum
from functools import partial
from pathlib import Path

import pictures
import torch
import tyro
from runs import load_latest, read_csv, rotation_of, write_csv
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import Bounded
from torchrl.envs import EnvBase, RewardSum, TransformedEnv
from tqdm import tqdm

from layeredrl_torchrl import (
    FixedEncoderNet,
    Hierarchy,
    ICEMPlanner,
    ModelFreeLevel,
    PlannerLevel,
    PredictorFactory,
    SACLearner,
    SkillLevel,
    SPlaTESReward,
    SuccessRate,
    Task,
    get_task,
    make_batched,
)


class Agent(Enum):
    """Who learns."""

    HIERARCHY = "hierarchy"
    PLANNER = "planner"
    SAC = "sac"


@dataclass
class Config:
    """Reach goals in a maze."""

    agent: Agent = Agent.HIERARCHY
    """A planner over skills, a planner over forces, or SAC on forces."""
    task: str = "PointMaze-U"
    """Name of the task, a point maze."""
    seed: int = 0
    """Seed of everything random."""
    skill_steps: int = 30_000
    """Real steps in which skills are drawn at random and learned, before the first plan."""
    total_env_steps: int = 80_000
    """Real steps in all."""
    n_envs: int = 20
    """Environments stepped side by side."""
    steps_per_batch: int = 2000
    """Real steps between two learning phases."""
    duration: int = 20
    """Real steps in a skill."""
    skill_std: float = 0.5
    """How close two outcomes may be and still be told apart, in standard deviations of outcomes."""
    symmetry_breaking_steps: int = 15_000
    """Real steps over which a random linear model of skills gives way to the learned one."""
    sac_updates_per_step: float = 0.25
    """Gradient steps of SAC for every force that was applied."""
    model_updates_per_action: float = 4.0
    """Gradient steps of the planner's model, reward and value for every action of the planner."""
    hidden_size: int = 64
    """Width of the two hidden layers of all networks."""
    n_models: int = 5
    """Members of the ensemble."""
    gamma: float = 0.99
    """Discount of a real step."""
    horizon: int = 10
    """Skills that are planned ahead."""
    n_samples: int = 128
    """Candidate plans in the first iteration."""
    n_iterations: int = 3
    """Iterations of the planner."""
    eval_episodes: int = 100
    """Episodes of the final evaluation, each with a new start and a new goal."""
    steps_per_checkpoint: int = 10_000
    """Real steps between two checkpoints; the last two are kept."""
    output: Path = Path("output/skill_hierarchy")
    """Folder; each agent has one of its own in it for its learning curve and checkpoints."""
    resume: bool = False
    """Go on from the last checkpoint in the output folder."""
    threads: int = 1
    """Threads that torch may use."""


# What a checkpoint does not fit if it is another.
SHAPE = ("agent", "task", "n_envs", "duration", "hidden_size", "n_models", "horizon")
NAN = float("nan")


def make_planner(config: Config, task: Task, step: int) -> PlannerLevel:
    """A level that plans with actions of `step` real steps each."""
    return PlannerLevel(
        predictor_factory=PredictorFactory(
            hidden_sizes=(config.hidden_size, config.hidden_size),
            n_models=config.n_models,
            gamma=config.gamma,
            partial_encoder=partial(
                FixedEncoderNet,
                latent_state_dims=list(task.state_dims),
                context_dims=list(task.context_dims),
            ),
            predictor_options={"tau": 0.01},
        ),
        planner_factory=partial(
            ICEMPlanner,
            horizon=config.horizon,
            n_samples=config.n_samples,
            n_iterations=config.n_iterations,
            discount=config.gamma**step,
            use_value_func=True,
        ),
        n_initial_random_steps=config.steps_per_batch,
        random_duration=1,
        updates_per_step=config.model_updates_per_action,
    )


def make_agent(config: Config, task: Task, env: EnvBase) -> Hierarchy:
    """A hierarchy of one or two levels."""
    learning = {
        "learner_factory": partial(
            SACLearner,
            hidden_sizes=(config.hidden_size, config.hidden_size),
            gamma=config.gamma,
            lr=1e-3,
            tau=0.01,
            alpha_init=0.1,
        ),
        "n_initial_random_steps": config.steps_per_batch,
        "updates_per_step": config.sac_updates_per_step,
    }
    if config.agent is Agent.SAC:
        return Hierarchy([ModelFreeLevel(**learning)], env)
    if config.agent is Agent.PLANNER:
        return Hierarchy([make_planner(config, task, 1)], env)
    planner = make_planner(config, task, config.duration)
    skills = SkillLevel(
        input_spec=Bounded(-1.0, 1.0, (2,)),
        duration=config.duration,
        # Skills are told apart by the place they lead to.
        skill_reward=SPlaTESReward(
            std=config.skill_std,
            state_dims=[0, 1],
            n_symmetry_breaking_steps=config.symmetry_breaking_steps,
        ),
        **learning,
    )
    # The planner sees all; a skill sees place and velocity, and not the goal.
    return Hierarchy([planner, skills], env, observation_maps=[None, list(task.state_dims)])


def make_env(task: Task, n: int, seed: int) -> TransformedEnv:
    env = make_batched(task, n, seed=seed)
    env.append_transform(RewardSum())
    env.append_transform(SuccessRate())
    return env


def set_phase(config: Config, agent: Hierarchy, steps: int) -> None:
    """First random skills, which are learned; then plans over skills that stay as they are."""
    if config.agent is Agent.HIERARCHY:
        planner, skills = agent.levels
        discovers = steps < config.skill_steps
        planner.random_prob = 1.0 if discovers else 0.0
        skills.updates_per_step = config.sac_updates_per_step if discovers else 0.0


def skill_reward(config: Config, agent: Hierarchy, data: TensorDict) -> float:
    """What the skills that ended in `data` are paid by the model as it is now, in nats."""
    if config.agent is not Agent.HIERARCHY:
        return NAN
    own = agent.transitions(data)[0]
    own = own[~own["next", "interrupted"].squeeze(-1)]
    if not len(own):
        return NAN
    read = own["observation"], own["action"], own["next", "observation"]
    return agent.levels[1].rate(*read).mean().item()


def learn(config: Config, agent: Hierarchy, env: EnvBase, rows: list[dict[str, float]]) -> None:
    """Collect and learn until all steps are taken; a row of `rows` for each batch."""
    folder = folder_of(config)
    rotation = rotation_of(folder)
    checkpoint = agent.checkpoint()
    steps = saved = int(rows[-1]["env_steps"]) if rows else 0
    start = time.monotonic() - (rows[-1]["seconds"] if rows else 0.0)
    if steps:
        env.set_seed(config.seed + steps)
    set_phase(config, agent, steps)
    collector = Collector(
        env,
        agent,
        frames_per_batch=config.steps_per_batch,
        total_frames=config.total_env_steps - steps,
        auto_register_policy_transforms=True,
    )
    total = config.total_env_steps
    with tqdm(total=total, initial=steps, unit="step", desc=config.agent.value) as bar:
        for data in collector:
            info = agent.learn(data)
            steps += data.numel()
            ended = data["next", "done"]
            success = data["next", "episode_success"][ended].float()
            row = {
                "env_steps": float(steps),
                "episodes": float(len(success)),
                "success": success.mean().item() if len(success) else NAN,
                "skill_reward": skill_reward(config, agent, data),
                "seconds": time.monotonic() - start,
            }
            rows.append(row | {"nll": info.get("PlannerLevel/nll", NAN)})
            bar.set_postfix(success=f"{row['success']:.2f}", nats=f"{row['skill_reward']:.2f}")
            bar.update(data.numel())
            set_phase(config, agent, steps)
            if steps - saved >= config.steps_per_checkpoint or steps >= total:
                write_csv(folder / "curve.csv", rows)
                rotation.save(checkpoint, step=steps, metadata={**plain(config), "steps": steps})
                saved = steps
    collector.shutdown()


@torch.no_grad()
def evaluate(config: Config, task: Task, agent: Hierarchy) -> list[TensorDict]:
    """Episodes `[n, T]` with new starts and goals, `eval_episodes` in all."""
    agent.eval()
    episodes: list[TensorDict] = []
    with tqdm(total=config.eval_episodes, unit="episode", desc="evaluation") as bar:
        while bar.n < config.eval_episodes:
            n = min(config.n_envs, config.eval_episodes - bar.n)
            env = make_env(task, n, config.seed + 100_000 + bar.n)
            env.append_transform(agent.make_tensordict_primer())
            episodes.append(env.rollout(task.horizon, agent))
            env.close()
            bar.update(n)
    return episodes


@torch.no_grad()
def draw(config: Config, task: Task, agent: Hierarchy, played: TensorDict) -> None:
    """All pictures."""
    folder, maze = folder_of(config), task.make_gym().unwrapped.maze
    folders = [config.output / one.value for one in Agent]
    folders = [one for one in folders if (one / "evaluation.csv").exists()]
    curves = {one.name: read_csv(one / "curve.csv") for one in folders}
    final = {one.name: read_csv(one / "evaluation.csv")[0]["success"] for one in folders}
    picture = config.output / "success.png"
    pictures.success_curves(curves, final, config.skill_steps, picture, config.task)
    plans, top, first = None, agent.levels[0], played[:8, 0]
    if isinstance(top, PlannerLevel):
        memory = top.planner.optimizer.forget(first.batch_size, torch.device("cpu"))
        start = TensorDict({"observation": first["observation"], "planner": memory}, [len(first)])
        actions, _ = top.planner.plan(start)
        imagined = top.predictor.rollout(first["observation"], actions, deterministic=True)
        reached = imagined["next", "state"][:, :, 0, :, :2]
        begin = first["observation"][:, None, None, :2].expand(-1, reached.shape[1], 1, 2)
        plans = torch.cat([begin, reached], 2).numpy()
    pictures.maze_plans(
        played["observation"][:8, :, :2].numpy(),
        first["observation"][:, list(task.context_dims)].numpy(),
        played["next", "episode_success"][:8, -1, 0].numpy(),
        plans,
        config.duration if config.agent is Agent.HIERARCHY else 1,
        maze,
        folder / "plans.png",
        f"{config.task}: new starts and goals ({config.agent.value})",
    )
    if config.agent is Agent.HIERARCHY:
        paths, chosen = play_skills(config, task, agent.levels[-1])
        title = f"{config.task}: what {config.duration} steps of each skill do, from rest"
        pictures.skill_fan(paths.numpy(), chosen.numpy(), maze, folder / "skills.png", title)


def play_skills(config: Config, task: Task, level: SkillLevel) -> tuple[torch.Tensor, torch.Tensor]:
    """Places `[n, duration + 1, 2]` under skills `[n, 2]` on a circle, each from rest."""
    n = 4 * config.n_envs
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


def plain(config: Config) -> dict:
    return {**asdict(config), "agent": config.agent.value, "output": str(config.output)}


def folder_of(config: Config) -> Path:
    return config.output / config.agent.value


def resume(config: Config, agent: Hierarchy) -> list[dict[str, float]]:
    """Load the last checkpoint of the output folder; returns the curve up to it."""
    saved = load_latest(folder_of(config), agent.checkpoint(), plain(config), SHAPE)
    return read_csv(folder_of(config) / "curve.csv", saved["steps"])


def main(config: Config) -> None:
    """Run the example."""
    try:
        task = get_task(config.task)
    except KeyError as error:
        raise SystemExit(error.args[0]) from None
    if not task.reports_success:
        raise SystemExit(f"{task.name} has no goals to reach; choose a point maze")
    folder = folder_of(config)
    if (folder / "checkpoints").exists() and not config.resume:
        raise SystemExit(f"{folder} holds a run; add --resume, or choose another --output")
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    env = make_env(task, config.n_envs, config.seed)
    agent = make_agent(config, task, env)
    rows = resume(config, agent) if config.resume else []
    folder.mkdir(parents=True, exist_ok=True)
    if not rows or rows[-1]["env_steps"] < config.total_env_steps:
        learn(config, agent, env, rows)
    episodes = evaluate(config, task, agent)
    reached = torch.cat([played["next", "episode_success"][:, -1, 0] for played in episodes])
    rate = reached.float().mean().item()
    outcome = {"env_steps": rows[-1]["env_steps"], "success": rate, "episodes": float(len(reached))}
    write_csv(folder / "evaluation.csv", [outcome])
    draw(config, task, agent, episodes[0])
    print(
        f"{config.task}, {config.agent.value}, seed {config.seed}, {int(rows[-1]['env_steps'])} "
        f"steps in {rows[-1]['seconds'] / 60:.0f} minutes: {rate:.0%} of "
        f"{len(reached)} new goals reached"
    )
    print(f"Pictures, curve and checkpoints: {folder}")


if __name__ == "__main__":
    options = (tyro.conf.EnumChoicesFromValues,)
    main(tyro.cli(Config, description=__doc__, config=options))
