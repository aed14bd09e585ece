"""Quality of an ensemble's predictions: likelihood, error and calibration on unseen transitions.

    python benchmarks/model_quality.py                         # HalfCheetah-v5 and Hopper-v5
    python benchmarks/model_quality.py --task Walker2d-v5 --seeds 3 4 --split episodes

Data: 10,000 training and 4,000 test transitions of a random policy that keeps its last action with
probability 1/2. They are one stream of 14,000, split at random, or (`--split episodes`) 10,000, and
4,000 from other episodes of another seed, which may reach states that are not in the training data.
Model: 5 members of 3 x 200, 1 mode. Training: 3,000 updates of batch 256 by `RewardPredictor.learn`
with its default settings. Scores of the equal mixture over members, in units of the standard
deviation of the training deltas:

- NLL: nats per dimension; RMSE: of the mixture's mean;
- ECE: mean gap between nominal and observed coverage of the marginal cdf at 19 levels, over all
  dimensions together and averaged over each dimension's own.

At horizon 10, particles follow the real actions of the other episodes, where no episode ends, and a
Gaussian with their mean and variance is scored in units of the real 10-step change.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from layeredrl_torchrl import (
    IdentityEncoder,
    ProbabilisticEnsemble,
    ProbFCDynamics,
    RewardNet,
    RewardPredictor,
    ValueNet,
)
from layeredrl_torchrl.runs import Count, RunError, Seed, command

LEVELS = torch.arange(1, 20) / 20


@dataclass
class Config:
    """Options of the benchmark."""

    task: tuple[str, ...] = ("HalfCheetah-v5", "Hopper-v5")
    """Tasks to score."""
    seeds: tuple[Seed, ...] = (0, 1)
    """Seeds of data and training; test data has a different seed."""
    split: Literal["random", "episodes"] = "random"
    """Whether test transitions come from the training episodes or from others."""
    n_train: Count = 10_000
    """Training transitions."""
    n_test: Count = 4_000
    """Test transitions."""
    n_updates: Count = 3_000
    """Gradient steps."""
    device: str = "cpu"
    """Device to learn on."""
    threads: Count = 1
    """Threads that torch may use."""


def collect(name: str, n: int, seed: int) -> TensorDict:
    """`n` consecutive transitions in the layout of TorchRL's collectors."""
    env, rng = gym.make(name), np.random.default_rng(seed)
    spaces = {"observations": env.observation_space, "actions": env.action_space}
    for what, space in spaces.items():
        if not isinstance(space, gym.spaces.Box):
            raise RunError(f"--task: {name} has {what} {space}, expected a Box")
    low, high = env.action_space.low, env.action_space.high
    observation, _ = env.reset(seed=seed)
    action, rows = None, []
    for _ in range(n):
        if action is None or rng.random() >= 0.5:
            action = rng.uniform(low, high)
        following, reward, terminated, truncated, _ = env.step(action)
        rows.append((observation, action, following, reward, terminated, terminated or truncated))
        observation = following
        if terminated or truncated:
            observation, _ = env.reset()
            action = None
    obs, act, following, reward, terminated, done = (np.asarray(x) for x in zip(*rows, strict=True))
    return TensorDict(
        {
            "observation": torch.from_numpy(obs).float(),
            "action": torch.from_numpy(act).float(),
            "next": {
                "observation": torch.from_numpy(following).float(),
                "reward": torch.from_numpy(reward).float()[:, None],
                "terminated": torch.from_numpy(terminated)[:, None],
                "done": torch.from_numpy(done)[:, None],
            },
        },
        batch_size=[n],
    )


def make_data(name: str, config: Config, seed: int) -> tuple[TensorDict, TensorDict, TensorDict]:
    """Make training and test transitions, and a stream for rollouts."""
    others = collect(name, config.n_test, seed + 1000)
    if config.split == "episodes":
        return collect(name, config.n_train, seed), others, others
    data = collect(name, config.n_train + config.n_test, seed)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(data)))
    return data[order[: config.n_train]], data[order[config.n_train :]], others


def make_predictor(data: TensorDict, action_space: gym.Space) -> RewardPredictor:
    """Make a predictor with the benchmark's ensemble and otherwise default settings."""
    dim = data["observation"].shape[-1]
    model = ProbabilisticEnsemble(
        state_space=gym.spaces.Box(-math.inf, math.inf, (dim,)),
        context_space=None,
        action_space=action_space,
        partial_net=partial(ProbFCDynamics, hidden_sizes=(200, 200, 200)),
        n_models=5,
        n_modes=1,
        n_particles_per_model=20,
    )
    return RewardPredictor(
        model=model,
        val_func=ValueNet(dim, 0),
        rew_func=RewardNet(dim, 0, action_space.shape[0]),
        encoder=IdentityEncoder((dim,)),
        latent_state_dim=dim,
    )


def learn_all(
    predictor: RewardPredictor, data: TensorDict, n_updates: int, *, progress: bool = False
) -> float:
    """Learn from `data` in one call, move to the CPU, and return milliseconds per update."""
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(len(data)))
    buffer.extend(data)
    start = time.perf_counter()
    predictor.learn(buffer, n_updates, 256, 256, len(data), progress=progress)
    ms = (time.perf_counter() - start) / n_updates * 1e3
    predictor.cpu()
    return ms


def calibration_error(cdf: torch.Tensor) -> tuple[float, float]:
    """Gap between nominal and observed coverage of `cdf [N, D]`, pooled and per dimension."""
    gap = (cdf <= LEVELS[:, None, None]).float().mean(1) - LEVELS[:, None]
    return gap.mean(1).abs().mean().item(), gap.abs().mean().item()


@torch.no_grad()
def one_step(predictor: RewardPredictor, test: TensorDict, unit: torch.Tensor) -> list[float]:
    """NLL per dimension, RMSE and the two ECEs of one-step predictions."""
    state, following = test["observation"], test["next", "observation"]
    moves = unit > 1e-6
    data = TensorDict(
        state=state, context=state[:, :0], action=test["action"], batch_size=len(test)
    )
    dist = predictor.model.dist(data)
    # The joint distribution shares a member over dimensions; the score per dimension is marginal.
    normal, weights = dist.modes, dist.mixture_distribution.logits
    log_prob = normal.log_prob(following.unsqueeze(-2)) + weights.unsqueeze(-1)
    marginal = log_prob.logsumexp(-2) + unit.log()
    joint = dist.log_prob(following) + unit[moves].log().sum()
    error = ((dist.mean - following) / unit)[:, moves]
    return [
        -marginal[:, moves].mean().item(),
        -joint.mean().item() / int(moves.sum()),
        error.square().mean().sqrt().item(),
        *calibration_error(dist.cdf(following)[:, moves]),
    ]


@torch.no_grad()
def ten_steps(predictor: RewardPredictor, test: TensorDict, horizon: int = 10) -> list[float]:
    """NLL per dimension, RMSE and the two ECEs of particles after `horizon` open-loop steps."""
    done = test["next", "done"].squeeze(-1)
    starts = [i for i in range(0, len(test) - horizon, 5) if not done[i : i + horizon - 1].any()]
    rows = torch.tensor(starts)[:, None] + torch.arange(horizon)
    state, actions = test["observation"][rows[:, 0]], test["action"][rows]
    following = test["next", "observation"][rows[:, -1]]
    traj = predictor.model.rollout(state, None, actions)
    particles = traj["next", "state"][..., -1, :].flatten(1, 2)
    unit = (following - state).std(0)
    moves = unit > 1e-6
    std, mean = torch.std_mean(particles, dim=1)
    normal = torch.distributions.Normal(mean[:, moves], std[:, moves].clamp_min(1e-6))
    error = ((mean - following) / unit)[:, moves]
    return [
        -(normal.log_prob(following[:, moves]) + unit[moves].log()).mean().item(),
        error.square().mean().sqrt().item(),
        *calibration_error((particles <= following[:, None]).float().mean(1)[:, moves]),
    ]


def main(config: Config) -> None:
    """Print one row for each task and seed."""
    torch.set_num_threads(config.threads)
    print(
        f"{'task':26} {'NLL/dim':>8} {'joint':>8} {'RMSE':>6} {'ECE':>6} {'by dim':>6}  |"
        f"{'NLL@10':>8} {'RMSE':>6} {'ECE':>6} {'by dim':>6}  | {'ms/update':>9}"
    )
    for name in config.task:
        for seed in config.seeds:
            train, test, stretches = make_data(name, config, seed)
            torch.manual_seed(seed)
            predictor = make_predictor(train, gym.make(name).action_space).to(config.device)
            ms = learn_all(predictor, train, config.n_updates)
            unit = (train["next", "observation"] - train["observation"]).std(0)
            nll, joint, rmse, ece, by_dim = one_step(predictor, test, unit)
            far = ten_steps(predictor, stretches)
            print(
                f"{name + ', seed ' + str(seed):26} {nll:8.3f} {joint:8.3f} {rmse:6.3f} {ece:6.3f} "
                f"{by_dim:6.3f}  |{far[0]:8.3f} {far[1]:6.3f} {far[2]:6.3f} {far[3]:6.3f}  | "
                f"{ms:9.1f}",
                flush=True,
            )


if __name__ == "__main__":
    command(main, Config, __doc__)
