"""Reach goals in a maze by SAC with hindsight: each step teaches how to reach several goals.

If only the goal gives a reward, a policy seldom sees one. In hindsight, each path was right for
another goal: a place that it reached later (arXiv 1707.01495).

    python examples/hindsight.py
    python examples/hindsight.py --hindsight-share 0    # SAC as it is
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torchrl.data import HERReplayBuffer, LazyTensorStorage
from torchrl.envs import EnvBase, RewardSum

from layeredrl_torchrl import (
    Hierarchy,
    ModelFreeLevel,
    SACLearner,
    SuccessRate,
    Task,
    make_batched,
    runs,
)
from layeredrl_torchrl.transforms import RelabelGoals


@dataclass
class Config(runs.RunOptions):
    """Reach goals in a maze by SAC."""

    task: str = "PointMaze-U-Sparse"
    """Name of the task: a point maze, or Reacher-Tip."""
    hindsight_share: runs.Share = 0.8
    """Share of each batch with a goal that was reached later; 0 for plain SAC."""
    total_env_steps: runs.Count = 80_000
    """Real steps in total."""
    n_envs: runs.Count = 20
    """Environments stepped side by side."""
    steps_per_batch: runs.Count = 2000
    """Real steps between two learning phases; actions are random until the first."""
    updates_per_step: runs.Positive = 0.5
    """Gradient steps per applied force."""
    hidden_size: runs.Count = 64
    """Width of the two hidden layers of all networks."""
    gamma: runs.Share = 0.99
    """Discount of a step."""
    eval_episodes: runs.Count = 100
    """Episodes of the final evaluation, each with a new start and a new goal."""
    steps_per_checkpoint: runs.Count = 10_000
    """Real steps between two checkpoints; the last two are kept."""
    output: Path = Path("output/hindsight")
    """Folder; each agent has a subfolder for its learning curve and checkpoints."""

    @property
    def agent(self) -> str:
        """Name of the agent, for its folder."""
        return "her" if self.hindsight_share else "sac"

    @property
    def folder(self) -> Path:
        """Folder of this agent's files."""
        return self.output / self.agent


def make_buffer(config: Config, task: Task) -> HERReplayBuffer:
    """Make a buffer that replaces some goals by places that were reached later."""
    relabel = RelabelGoals(
        task.observation_dim,
        achieved=task.state_dims[:2],
        desired=task.context_dims,
        reward_func=lambda place, goal: task.reward(place, goal, place, place),
    )
    storage = LazyTensorStorage(max(200_000, config.total_env_steps))
    return relabel.make_buffer(storage=storage, her_ratio=config.hindsight_share)


def make_agent(config: Config, task: Task, env: EnvBase) -> Hierarchy:
    """SAC as a hierarchy of one level."""
    level = ModelFreeLevel(
        learner_factory=partial(
            SACLearner,
            hidden_sizes=(config.hidden_size, config.hidden_size),
            gamma=config.gamma,
            lr=1e-3,
            tau=0.01,
            alpha_init=0.1,
        ),
        buffer=make_buffer(config, task),
        n_initial_random_steps=config.steps_per_batch,
        updates_per_step=config.updates_per_step,
    )
    return Hierarchy([level], env)


def make_env(task: Task, n: int, seed: int, **kwargs) -> EnvBase:
    env = make_batched(task, n, seed=seed, **kwargs).append_transform(RewardSum())
    return env.append_transform(SuccessRate())


def main(config: Config) -> None:
    """Learn and save checkpoints; then reach new goals."""
    task = runs.find_task(config.task, with_goals=True)
    with runs.Run(config, config.total_env_steps) as run:
        env = make_env(task, config.n_envs, config.seed)
        agent = make_agent(config, task, env).to(config.device)
        run.keep(**agent.parts())
        for data in run.collect(env, agent):
            info = agent.learn(data)
            success = data["next", "episode_success"][data["next", "done"]].float()
            row = {"success": success.mean().item() if len(success) else math.nan}
            row["loss_qvalue"] = info.get("ModelFreeLevel/loss_qvalue", math.nan)
            row |= run.evaluation(partial(make_env, task), agent)
            run.log(run.returns(data) | row)
        run.finish(partial(make_env, task), agent, seed=config.seed + 100_000)


if __name__ == "__main__":
    runs.command(main, Config, __doc__)
