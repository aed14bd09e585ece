"""Many tasks for the price of one: learn skills and their model once, without any reward.

Then each task is just a reward function for a planner over the skills, and needs no further real
step: reach a goal, visit places in order, stay away from a region, follow a moving target.

    python examples/many_tasks.py
    python benchmarks/many_tasks.py    # compare a planner over forces, and SAC on each task
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Unbounded
from torchrl.envs import Compose, EnvBase, RewardSum, Transform

from layeredrl_torchrl import (
    FixedEncoderNet,
    Hierarchy,
    ICEMPlanner,
    PlannerLevel,
    PredictorFactory,
    SACLearner,
    SkillLevel,
    SPlaTESReward,
    make_batched,
    point_maze,
    reads_next_state,
    runs,
)
from layeredrl_torchrl.nets import Landmarks

HALF = ("#########", "#...#...#", "#.......#", "#...#...#")
ROOMS = (*HALF, "##.###.##", *reversed(HALF))  # four, each with doors to two others
MAZE = point_maze("Rooms", ROOMS, horizon=400)
MIDDLES = torch.tensor([[-2.0, 2.0], [2.0, 2.0], [2.0, -2.0], [-2.0, -2.0]])
DOOR = torch.tensor([0.0, 2.0])
# Observations, [7]: place and velocity; the target's place, and the number of targets reached.
STATE, CONTEXT, DURATION = (0, 1, 2, 3), (4, 5, 6), 20  # and the real steps of a skill


@reads_next_state
def be_near(state: Tensor, context: Tensor, action: Any, next_state: Tensor) -> Tensor:
    return (context[..., :2] - next_state[..., :2]).norm(dim=-1).neg().exp()


@reads_next_state
def go_on(state: Tensor, context: Tensor, action: Any, next_state: Tensor) -> Tensor:
    return (context[..., 2] + be_near(state, context, action, next_state)) / 4


@reads_next_state
def stay_away(state: Tensor, context: Tensor, action: Any, next_state: Tensor) -> Tensor:
    inside = (next_state[..., :2] - DOOR.to(next_state)).norm(dim=-1) < 0.7
    return be_near(state, context, action, next_state) - 10.0 * inside


class Job(NamedTuple):
    """A reward and its target's places. The target moves on if reached, or at constant speed."""

    reward: Callable[..., Tensor]  # (state, context, action, next_state) -> [*B]
    places: Tensor  # [n, 2]
    speed: float = 0.0  # places per step

    def target(self, stage: Tensor) -> Tensor:
        """Place ``[*B, 2]`` at stages ``[*B]``."""
        n, now = len(self.places), stage.long()
        if not self.speed:
            return self.places[now.clamp(max=n - 1)]
        ends = self.places[now % n], self.places[(now + 1) % n]
        return torch.lerp(*ends, (stage % 1).unsqueeze(-1))


JOBS = {
    "reach": Job(be_near, MIDDLES[2:3]),
    "in_order": Job(go_on, MIDDLES[[1, 0, 3]]),
    "stay_away": Job(stay_away, MIDDLES[1:2]),
    "follow": Job(be_near, MIDDLES, speed=0.004),
}


class Assign(Transform):
    """Replaces the maze's goal by a job's target and stage, and the reward by the job's."""

    def __init__(self, job: Job) -> None:
        super().__init__(in_keys=["observation"], out_keys=["observation"])
        self.job = job

    def _see(self, state: Tensor, stage: Tensor) -> Tensor:
        return torch.cat([state, self.job.target(stage), stage.unsqueeze(-1)], -1)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        state = next_tensordict["observation"][..., STATE]
        context = tensordict["observation"][..., CONTEXT]
        reward = self.job.reward(state, context, None, state).unsqueeze(-1)
        reached = (context[..., :2] - state[..., :2]).norm(dim=-1) <= 0.45
        stage = context[..., 2] + (self.job.speed or reached)
        stage = stage if self.job.speed else stage.clamp(max=len(self.job.places))
        return next_tensordict.update({"observation": self._see(state, stage), "reward": reward})

    def _reset(self, tensordict: Any, tensordict_reset: TensorDictBase) -> TensorDictBase:
        state = tensordict_reset["observation"][..., STATE]
        return tensordict_reset.set("observation", self._see(state, 0 * state[..., 0]))

    def transform_observation_spec(self, observation_spec: Any) -> Any:
        shape = observation_spec["observation"].shape[:-1]
        observation_spec["observation"] = Unbounded((*shape, len(STATE + CONTEXT)))
        return observation_spec


@dataclass
class Config(runs.RunOptions):
    """Learn skills without a reward, then plan for four jobs."""

    task: str = "Rooms"
    """Name of the maze; there is only this one."""
    total_env_steps: runs.Count = 40_000
    """Real steps, all before the first job."""
    skill_steps: runs.Natural = 30_000
    """Real steps in which skills learn; in the rest only their model learns."""
    horizon: runs.Count = 8
    """Skills in a plan."""
    n_envs: runs.Count = 20
    """Environments stepped side by side."""
    steps_per_batch: runs.Count = 2000
    """Real steps between two learning phases."""
    eval_episodes: runs.Count = 20
    """Episodes per job, all with new starts."""
    steps_per_checkpoint: runs.Count = 10_000
    """Real steps between two checkpoints; the last two are kept."""
    output: Path = Path("output/many_tasks")
    """Folder of the learning curve, the checkpoints and the returns."""
    without_effect = frozenset({"task", "steps_per_evaluation", "episodes_per_evaluation", "video"})


def no_reward(state: Tensor, context: Tensor, action: Tensor) -> Tensor:
    return torch.zeros_like(state[..., 0])


ENCODER = partial(FixedEncoderNet, latent_state_dims=STATE, context_dims=CONTEXT)
FACTORY = PredictorFactory(
    hidden_sizes=(64, 64), rew_func=no_reward, val_func=no_reward, partial_encoder=ENCODER
)


def make_planner(
    factory: Callable[..., Any], config: Config, discount: float = 0.99**DURATION, **options: Any
) -> PlannerLevel:
    planner = partial(ICEMPlanner, horizon=config.horizon, n_samples=128, n_iterations=3)
    search = {"deterministic": True, "deterministic_mode": "best", "use_value_func": True}
    planner = partial(planner, discount=discount, **search)
    return PlannerLevel(predictor_factory=factory, planner_factory=planner, **options)


def make_skills(config: Config) -> SkillLevel:
    """Make skills that are distinguished by the place they lead to."""
    sac = partial(SACLearner, hidden_sizes=(64, 64), lr=1e-3, tau=0.01, alpha_init=0.1)
    reward = SPlaTESReward(state_dims=[0, 1], n_symmetry_breaking_steps=15_000)
    rest = {"input_spec": Bounded(-1.0, 1.0, (2,)), "duration": DURATION, "learner_factory": sac}
    skills = SkillLevel(skill_reward=reward, n_initial_random_steps=config.steps_per_batch, **rest)
    skills.interrupt_after = DURATION // 2  # in the jobs: plan twice as often
    return skills


def make_env(job: Job, n: int, seed: int) -> EnvBase:
    return make_batched(MAZE, n, seed=seed).append_transform(Compose(Assign(job), RewardSum()))


def main(config: Config) -> None:
    """Learn without a reward and save checkpoints; then do the jobs."""
    with runs.Run(config, config.total_env_steps) as run:
        env = make_env(JOBS["reach"], config.n_envs, config.seed)
        top = make_planner(FACTORY, config, random_prob=1.0, updates_per_step=4.0)
        skills, ways = make_skills(config), Landmarks(2, radius=0.3)
        agent = Hierarchy([top, skills], env, observation_maps=[None, STATE]).to(config.device)
        ways.to(config.device)
        run.keep(**agent.parts(), ways=ways)
        for data in run.collect(env, agent):
            skills.updates_per_step = 0.25 if run.steps <= config.skill_steps else 0.0
            ways.extend(data["observation"][..., :2])
            run.log({"nll": agent.learn(data).get("PlannerLevel/nll", math.nan)})
        for name, job in JOBS.items():
            predictor = top.predictor
            predictor.rew_func, predictor.term_func = job.reward, ways.is_strange
            predictor.val_func = ways.value_of(job.reward, speed=0.5, discount=0.99**DURATION)
            env = make_env(job, config.eval_episodes, config.seed + 100_000)
            env.append_transform(agent.make_tensordict_primer())
            run.report(runs.play_episodes(env, agent.eval(), config.device), how=name)


if __name__ == "__main__":
    runs.command(main, Config, __doc__)
