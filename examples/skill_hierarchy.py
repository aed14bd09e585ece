"""Discover skills without any reward, then plan over them to reach goals never seen before.

Two levels control a point maze or an arm. The lower one learns skills of a fixed duration; their
only reward is how well the upper one's model can tell them apart. The upper one plans in this model
which skills lead to the goal. The value after a plan is learned, or known from landmarks' paths.

    python examples/skill_hierarchy.py
    python examples/skill_hierarchy.py --task PointMaze-Large-Sparse --landmarks 0.3 --horizon 5
    python examples/skill_hierarchy.py --task Reacher-Tip --landmarks 0.03 --duration 5 --horizon 5
    python examples/skill_hierarchy.py --agent planner    # over forces, for comparison
    python benchmarks/pictures.py output/skill_hierarchy/*
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from tensordict import TensorDictBase
from torchrl.data import Bounded
from torchrl.envs import Compose, EnvBase, RewardSum

import layeredrl_torchrl as lt
from layeredrl_torchrl import runs
from layeredrl_torchrl.nets import Landmarks


@dataclass
class Config(runs.RunOptions):
    """Reach goals in a maze, or with an arm."""

    agent: Literal["hierarchy", "planner"] = "hierarchy"
    """A planner over skills, or a planner over forces."""
    task: str = "PointMaze-U"
    """Name of the task: a point maze, or Reacher-Tip, where the place is that of an arm's tip."""
    skill_steps: runs.Natural = 30_000
    """Real steps before the first plan, in which random skills are learned."""
    total_env_steps: runs.Count = 80_000
    """Real steps in total."""
    n_envs: runs.Count = 20
    """Environments stepped side by side."""
    steps_per_batch: runs.Count = 2000
    """Real steps between two learning phases."""
    duration: runs.Count = 20
    """Real steps in a skill."""
    skill_std: runs.Positive = 0.5
    """Distance at which two outcomes are still distinct, in standard deviations of outcomes."""
    symmetry_breaking_steps: runs.Natural = 15_000
    """Real steps over which the learned model of skills replaces a random linear one."""
    sac_updates_per_step: runs.Positive = 0.25
    """Gradient steps of SAC per applied force."""
    model_updates_per_action: runs.Positive = 4.0
    """Gradient steps of the planner's model, reward and value per action of the planner."""
    hidden_size: runs.Count = 64
    """Width of the two hidden layers of all networks."""
    n_models: runs.Count = 5
    """Members of the ensemble."""
    gamma: runs.PositiveShare = 0.99
    """Discount of a real step."""
    horizon: runs.Count = 10
    """Skills in a plan."""
    landmarks: runs.NotNegative = 0.0
    """Radius of landmarks in m; 0 to learn reward and value instead."""
    random_prob: runs.Share = 1.0
    """With landmarks, before there is a task: probability that ten random skills begin."""
    n_samples: runs.Count = 128
    """Candidate plans in the first iteration."""
    n_iterations: runs.Count = 3
    """Iterations of the planner."""
    eval_episodes: runs.Count = 100
    """Episodes of the final evaluation, each with a new start and a new goal."""
    steps_per_checkpoint: runs.Count = 10_000
    """Real steps between two checkpoints; the last two are kept."""
    output: Path = Path("output/skill_hierarchy")
    """Folder; each agent has a subfolder for its learning curve and checkpoints."""

    @property
    def without_effect(self) -> frozenset[str]:
        """What nothing reads: how to explore without landmarks, and how to learn no skills."""
        names = {"random_prob"} if self.agent == "planner" or not self.landmarks else set()
        if self.agent == "planner":
            names |= {"skill_steps", "duration", "skill_std", "symmetry_breaking_steps"}
            names.add("sac_updates_per_step")
        return frozenset(names)

    @property
    def folder(self) -> Path:
        """Folder of this agent's files."""
        return self.output / self.agent


def make_planner(config: Config, task: lt.Task, step: int) -> lt.PlannerLevel:
    """A level that plans with actions of `step` real steps each."""
    ways, known = None, {"n_models": config.n_models, "predictor_options": {"tau": 0.01}}
    if config.landmarks:
        ways = Landmarks(2, radius=config.landmarks, scale=5.0, top=1 / (1 - config.gamma**step))
        known |= {"rew_func": task.rew_func(), "val_func": ways.value, "term_func": ways.is_strange}
    dims = {"latent_state_dims": list(task.state_dims), "context_dims": list(task.context_dims)}
    search = {name: getattr(config, name) for name in ("horizon", "n_samples", "n_iterations")}
    best = {"use_value_func": True, "deterministic_mode": "best"}  # in evaluation as in training
    level = lt.PlannerLevel(
        predictor_factory=lt.PredictorFactory(
            hidden_sizes=2 * (config.hidden_size,),
            gamma=config.gamma,
            partial_encoder=partial(lt.FixedEncoderNet, **dims),
            **known,
        ),
        planner_factory=partial(
            lt.ICEMPlanner, discount=config.gamma**step, deterministic=bool(ways), **search, **best
        ),
        n_initial_random_steps=config.steps_per_batch,
        updates_per_step=config.model_updates_per_action,
    )
    level.landmarks = ways  # a submodule: saved with the level
    return level


def make_agent(config: Config, task: lt.Task, env: EnvBase) -> lt.Hierarchy:
    """A hierarchy of one or two levels."""
    if config.agent == "planner":
        return lt.Hierarchy([make_planner(config, task, 1)], env)
    planner = make_planner(config, task, config.duration)
    sac = partial(
        lt.SACLearner, hidden_sizes=2 * (config.hidden_size,), gamma=config.gamma, tau=0.01
    )
    told = {"std": config.skill_std, "n_symmetry_breaking_steps": config.symmetry_breaking_steps}
    skills = lt.SkillLevel(
        input_spec=Bounded(-1.0, 1.0, (2,)),
        duration=config.duration,
        skill_reward=lt.SPlaTESReward(state_dims=[0, 1], **told),  # by the place they lead to
        learner_factory=partial(sac, lr=1e-3, alpha_init=0.1),
        n_initial_random_steps=config.steps_per_batch,
        updates_per_step=config.sac_updates_per_step,
    )
    # The planner sees all; a skill sees place and velocity, and not the goal.
    return lt.Hierarchy([planner, skills], env, observation_maps=[None, list(task.state_dims)])


def make_env(task: lt.Task, n: int, seed: int, **kwargs) -> EnvBase:
    transforms = Compose(RewardSum(), lt.SuccessRate())
    return lt.make_batched(task, n, seed=seed, **kwargs).append_transform(transforms)


def no_reward(state, context, action):
    return 0.0 * state[..., 0]


def set_phase(config: Config, task: lt.Task, agent: lt.Hierarchy, steps: float) -> None:
    """Skills are learned, at first random ones; then plans over skills that stay as they are."""
    if config.agent == "hierarchy":
        planner, skills = agent.levels
        discovers = steps < min(config.skill_steps, config.total_env_steps)
        explores = discovers and steps >= config.symmetry_breaking_steps and config.landmarks
        skills.updates_per_step = config.sac_updates_per_step if discovers else 0.0
        planner.random_prob = config.random_prob if explores else float(discovers)
        if ways := planner.landmarks:
            planner.predictor.rew_func = no_reward if explores else task.rew_func()
            planner.predictor.val_func = ways.novelty if explores else ways.value


def row_of(agent: lt.Hierarchy, data: TensorDictBase, info: dict[str, float]) -> dict[str, float]:
    """What the learning curve says of a batch: also the mean pay of the skills that ended in it."""
    success = data["next", "episode_success"][data["next", "done"]].float()
    row = {"success": success.mean().item() if len(success) else math.nan, "skill_reward": math.nan}
    if len(agent.levels) > 1:
        own = agent.transitions(data)[0]
        own = own[~own["next", "interrupted"].squeeze(-1)]
        inputs = own["observation"], own["action"], own["next", "observation"]
        row["skill_reward"] = agent.levels[1].rate(*inputs).mean().item() if len(own) else math.nan
    return row | {"nll": info.get("PlannerLevel/nll", math.nan)}


def main(config: Config) -> None:
    """Discover, plan, learn and save checkpoints; then reach new goals."""
    task = runs.find_task(config.task, with_goals=True)
    if config.duration > task.horizon:
        raise runs.RunError(f"--duration is {config.duration}, episodes have {task.horizon} steps")
    if config.landmarks and config.gamma == 1.0:
        raise runs.RunError("--gamma is 1, expected less with --landmarks: values are bounded then")
    with runs.Run(config, config.total_env_steps) as run:
        env = make_env(task, config.n_envs, config.seed)
        agent = make_agent(config, task, env).to(config.device)
        run.keep(**agent.parts())
        set_phase(config, task, agent, run.steps)
        for data in run.collect(env, agent):
            row = run.returns(data) | row_of(agent, data, agent.learn(data))
            if config.landmarks:
                agent.levels[0].landmarks.extend(data["observation"][..., task.state_dims[:2]])
            set_phase(config, task, agent, math.inf)  # evaluations are for the task
            run.log(row | run.evaluation(partial(make_env, task), agent))
            set_phase(config, task, agent, run.steps)
        run.finish(partial(make_env, task), agent, seed=config.seed + 100_000)


if __name__ == "__main__":
    runs.command(main, Config, __doc__)
