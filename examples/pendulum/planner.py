"""Learn Pendulum-v1 by planning in a learned model: `sac.py`, with a planner for the actor.

python examples/pendulum/planner.py --seed 0
"""

import argparse
from functools import partial

import torch
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv, RewardScaling, SerialEnv, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from layeredrl_torchrl import ICEMPlanner, PlannerLevel, PredictorFactory

parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--total-env-steps", type=int, default=3000)
parser.add_argument("--random-steps", type=int, default=200)
parser.add_argument("--updates-per-step", type=int, default=2)
parser.add_argument("--steps-per-evaluation", type=int, default=500)
args = parser.parse_args()
if not (0 <= args.seed < 2**32 and min(vars(args).values()) >= 0):
    parser.error("--seed must be from 0 to 4294967295, and no number below 0")
if min(args.total_env_steps, args.steps_per_evaluation) < 1 or args.steps_per_evaluation % 50:
    parser.error("--total-env-steps must be at least 1, --steps-per-evaluation a multiple of 50")
torch.manual_seed(args.seed)

env = TransformedEnv(GymEnv("Pendulum-v1"), RewardScaling(loc=0.0, scale=0.1))
env.set_seed(args.seed)
eval_env = SerialEnv(10, lambda: GymEnv("Pendulum-v1"))  # ten episodes at once
buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100_000), batch_size=128)

level = PlannerLevel(
    env=env,
    buffer=buffer,
    predictor_factory=PredictorFactory(hidden_sizes=(64, 64)),
    planner_factory=partial(ICEMPlanner, horizon=20, n_samples=64, n_iterations=3),
    n_initial_random_steps=args.random_steps,
    updates_per_step=args.updates_per_step,
)
eval_env = eval_env.append_transform(level.make_tensordict_primer())
collector = Collector(
    env,
    level,
    frames_per_batch=50,
    total_frames=args.total_env_steps,
    auto_register_policy_transforms=True,
)
for data in collector:
    level.learn(data)
    n_steps = len(buffer)
    if n_steps % args.steps_per_evaluation == 0:
        eval_env.set_seed(1000)  # the same starts each time
        with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
            reward = eval_env.rollout(200, level)["next", "reward"]
        print(f"{n_steps} steps: return {reward.sum((-2, -1)).mean().item():.0f}", flush=True)
