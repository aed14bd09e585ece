"""Learn to control a task from stored data alone, without real steps.

A weak and noisy controller makes a data set in the layout of TorchRL's `MinariExperienceReplay`. A
policy is cloned from it. A predictor learns from it, too: an `ICEMPlanner` plans in the predictor,
and TorchRL's SAC learns from its imagined episodes. Both get less reward where the members of the
ensemble disagree: without data the model is wrong, and plans would exploit its errors.

    python examples/offline.py --seed 0

prints, and writes to `results.csv`, the mean returns of the data, of the cloned policy, of the
planner and of SAC.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor
from torchrl.data import (
    ImmutableDatasetWriter,
    LazyTensorStorage,
    TensorDictReplayBuffer,
    TensorStorage,
)
from torchrl.envs import (
    EnvBase,
    ExplorationType,
    RewardSum,
    StepCounter,
    set_exploration_type,
)
from torchrl.objectives import SACLoss, SoftUpdate
from tqdm import trange

import layeredrl_torchrl as lt
from layeredrl_torchrl import runs
from layeredrl_torchrl.nets import QValueOperator, TanhActor


@dataclass
class Config:
    """Learn to control Reacher-v5 from the data of a weak controller."""

    seed: runs.Seed = 0
    """Seed of everything random."""
    n_transitions: runs.Count = 5000
    """Size of the data set."""
    noise: runs.Positive = 0.3
    """Std of the noise in the controller's actions, which range from -1 to 1."""
    n_updates: runs.Count = 2000
    """Gradient steps for each of the model, the cloned policy and SAC."""
    pessimism: runs.Number = 1.0
    """Cost of a unit of disagreement, in rewards; 0 trusts the model."""
    episode_steps: runs.Count = 10
    """Steps of SAC's imagined episodes, which start from states of the data."""
    hidden_size: runs.Count = 64
    """Width of the two hidden layers of all networks."""
    eval_episodes: runs.Count = 20
    """Episodes of each evaluation."""
    threads: runs.Count = 1
    """Threads that torch may use."""
    output: Path = Path("output/offline")
    """Folder of the results."""


TASK = lt.get_task("Reacher-v5")
SPLIT = {"latent_state_dims": TASK.state_dims, "context_dims": TASK.context_dims}


def weak_controller(observation: Tensor, noise: float) -> Tensor:
    """Pull the fingertip gently towards the target, with noise."""
    cos1, cos2, sin1, sin2, _, _, _, _, dx, dy = observation.unbind(-1)
    speed = observation[..., 6:8]
    cos12, sin12 = cos1 * cos2 - sin1 * sin2, sin1 * cos2 + cos1 * sin2
    elbow = 0.11 * (sin12 * dx - cos12 * dy)  # by the Jacobian of the arm
    shoulder = elbow + 0.1 * (sin1 * dx - cos1 * dy)
    torque = 3.0 * torch.stack([shoulder, elbow], -1) - 0.002 * speed
    return (torque + noise * torch.randn_like(torque)).clamp(-1.0, 1.0)


def make_env(n: int, seed: int) -> EnvBase:
    """Make `n` environments side by side, with the returns of their episodes."""
    return lt.make_batched(TASK, n, seed=seed).append_transform(RewardSum())


def make_data(config: Config) -> tuple[TensorDictReplayBuffer, float]:
    """Make a read-only data set `[N]` of whole episodes; return it with their mean return."""
    act = partial(weak_controller, noise=config.noise)
    policy = TensorDictModule(act, ["observation"], ["action"])
    env, n_steps = make_env(10, config.seed), -(-config.n_transitions // 10)
    data = env.rollout(n_steps, policy, break_when_any_done=False)  # [env, T]
    env.close()
    ends = data["next", "done"]
    if not ends.any():
        raise runs.RunError(f"--n-transitions is {config.n_transitions}, ten episodes have 500")
    mean_return = data["next", "episode_reward"][ends].mean().item()
    data["next", "truncated"][:, -1] = data["next", "done"][:, -1] = True  # where storing ends
    storage = TensorStorage(data.select("observation", "action", "next").reshape(-1))
    return TensorDictReplayBuffer(storage=storage, writer=ImmutableDatasetWriter()), mean_return


def clone(config: Config, data: TensorDictReplayBuffer, env: EnvBase) -> TensorDictModule:
    """Clone the behaviour: a deterministic policy that imitates the actions of the data."""
    sizes = TASK.observation_dim, 0, env.action_spec_unbatched, (config.hidden_size,) * 2
    actor = TanhActor(*sizes, in_keys=["observation"])
    optim = torch.optim.Adam(actor.parameters(), 1e-3)
    for _ in trange(config.n_updates, desc="cloning", leave=False):
        batch = data.sample(256)
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            action = actor(batch.select("observation"))["action"]
        optim.zero_grad()
        (action - batch["action"]).square().mean().backward()
        optim.step()
    return actor


def learn_model(config: Config, data: TensorDictReplayBuffer, env: EnvBase) -> lt.RewardPredictor:
    """Learn a predictor from the data; its values are those of the controller's actions."""
    encoder = partial(lt.FixedEncoderNet, **SPLIT)
    widths = (config.hidden_size,) * 2
    factory = lt.PredictorFactory(hidden_sizes=widths, n_models=5, partial_encoder=encoder)
    predictor = factory(env.observation_spec_unbatched, env.action_spec_unbatched)
    predictor.learn(data, config.n_updates, 256, 256, len(data), progress=True)
    return predictor.eval()


def make_planner(config: Config, predictor: lt.RewardPredictor) -> lt.ICEMPlanner:
    """Make a planner whose plans stay where the members agree."""
    cost = lt.EnsembleDisagreement(predictor.model, scale=-config.pessimism)
    options = {"horizon": 15, "n_samples": 100, "n_iterations": 3, "use_value_func": True}
    return lt.ICEMPlanner(
        predictor, exploration_bonus=cost, deterministic_mode="best", discount=0.99, **options
    )


def imagined_sac(
    config: Config, data: TensorDictReplayBuffer, predictor: lt.RewardPredictor
) -> TensorDictSequential:
    """Train TorchRL's SAC on imagined episodes that start from states of the data."""
    dims = predictor.latent_state_dim, predictor.context_dim
    sizes = *dims, predictor.model.action_spec, (config.hidden_size,) * 2
    actor = TanhActor(*sizes)
    loss = SACLoss(actor, QValueOperator(*sizes), alpha_init=0.1)
    loss.make_value_estimator(gamma=0.99)
    target, optim = SoftUpdate(loss, tau=0.01), torch.optim.Adam(loss.parameters(), 1e-3)
    env = lt.PredictorEnv(
        predictor,
        propagation=lt.TSInfinity(),
        sample_termination=True,
        initial_states=lt.FromBuffer(data, predictor),
        exploration_bonus=lt.EnsembleDisagreement(predictor.model, scale=-config.pessimism),
        batch_size=[500],
    )
    env = env.append_transform(StepCounter(config.episode_steps))
    memory = TensorDictReplayBuffer(storage=LazyTensorStorage(50_000), batch_size=256)
    for i in trange(config.n_updates, desc="SAC", leave=False):
        if i % 50 == 0:
            with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
                episodes = env.rollout(config.episode_steps, actor, break_when_any_done=False)
            memory.extend(episodes.reshape(-1))
        losses = loss(memory.sample())
        optim.zero_grad()
        sum(losses[name] for name in ("loss_actor", "loss_qvalue", "loss_alpha")).backward()
        optim.step()
        target.step()
    return TensorDictSequential(predictor.encoder, actor)


def evaluate(config: Config, policy: TensorDictModule) -> float:
    """The mean return in the real environment, which was not used for learning."""
    env = make_env(config.eval_episodes, config.seed + 10_000)
    if hasattr(policy, "make_tensordict_primer"):
        env.append_transform(policy.make_tensordict_primer())
    return runs.play_episodes(env, policy)["episode_reward"].mean().item()


def main(config: Config) -> None:
    """Make the data, learn from it, and compare."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    config.output.mkdir(parents=True, exist_ok=True)
    data, data_return = make_data(config)
    env = make_env(1, config.seed)
    predictor = learn_model(config, data, env)
    returns = {"data": data_return, "cloned": evaluate(config, clone(config, data, env))}
    returns["planned"] = evaluate(config, make_planner(config, predictor))
    returns["imagined SAC"] = evaluate(config, imagined_sac(config, data, predictor))
    for name, value in returns.items():
        print(f"{name:12} {value:7.1f}")
    with (config.output / "results.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["policy", "mean return"], *returns.items()])


if __name__ == "__main__":
    runs.command(main, Config, __doc__)
