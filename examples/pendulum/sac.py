"""Learn Pendulum-v1 by SAC: an ordinary TorchRL script, without a model.

python examples/pendulum/sac.py --seed 0
"""

import argparse
from functools import partial

import torch
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv, RewardScaling, SerialEnv, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss, SoftUpdate

parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--total-env-steps", type=int, default=3000)
parser.add_argument("--random-steps", type=int, default=200)
parser.add_argument("--updates-per-step", type=int, default=1)
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
spec = env.action_spec
buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(100_000), batch_size=128)

mlp = partial(MLP, num_cells=[128, 128], activation_class=nn.ReLU)
net = nn.Sequential(mlp(3, 2), NormalParamExtractor())
actor = ProbabilisticActor(
    TensorDictModule(net, ["observation"], ["loc", "scale"]),
    in_keys=["loc", "scale"],
    spec=spec,
    distribution_class=TanhNormal,
    distribution_kwargs={"low": spec.space.low, "high": spec.space.high},
)
critic = ValueOperator(mlp(4, 1), in_keys=["observation", "action"])
loss = SACLoss(actor, critic, loss_function="l2", alpha_init=0.1)
loss.make_value_estimator(gamma=0.99)
target = SoftUpdate(loss, tau=0.01)
optim = torch.optim.Adam(loss.parameters(), lr=1e-3)

collector = Collector(
    env,
    actor,
    frames_per_batch=50,
    total_frames=args.total_env_steps,
    init_random_frames=args.random_steps,
)
for data in collector:
    buffer.extend(data)
    n_steps = len(buffer)
    if n_steps >= args.random_steps:
        for _ in range(args.updates_per_step * data.numel()):
            terms = loss(buffer.sample())
            optim.zero_grad()
            (terms["loss_actor"] + terms["loss_qvalue"] + terms["loss_alpha"]).backward()
            optim.step()
            target.step()
    if n_steps % args.steps_per_evaluation == 0:
        eval_env.set_seed(1000)  # the same starts each time
        with set_exploration_type(ExplorationType.DETERMINISTIC), torch.no_grad():
            reward = eval_env.rollout(200, actor)["next", "reward"]
        print(f"{n_steps} steps: return {reward.sum((-2, -1)).mean().item():.0f}", flush=True)
