"""Quality of a learned reward and value function on held-out episodes.

    python benchmarks/predictor_quality.py                    # HalfCheetah-v5, 3 seeds
    python benchmarks/predictor_quality.py --seeds 1 --n-updates 2000

The data are 20,000 transitions of a random policy that keeps its last action with probability 1/2;
the last fifth of the episodes is held out. A `RewardPredictor` with default settings learns from
the rest, in one call of `learn`.

- reward R2: 1 - squared error / variance, over all held-out steps, and over those whose observation
  is within the range of the training data (held-out episodes may leave it);
- value correlation: of the value function with the discounted return to the end of the episode,
  over the held-out steps with at least 300 steps left: at a discount of 0.99, the missing rest has
  a weight of 0.05 at most. The policy is random, so most of a return is noise that no function of
  the state can predict; for comparison, the same correlation on the training episodes is printed,
  too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import gymnasium as gym
import torch
from model_quality import collect, learn_all
from tensordict import TensorDict

from layeredrl_torchrl import (
    IdentityEncoder,
    ProbabilisticEnsemble,
    RewardNet,
    RewardPredictor,
    ValueNet,
)
from layeredrl_torchrl.runs import Count, Seed, command

GAMMA = 0.99


@dataclass
class Config:
    """Options of the benchmark."""

    task: str = "HalfCheetah-v5"
    """Task to learn; its episodes have 1,000 steps."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Seeds of data and training."""
    n_steps: Count = 20_000
    """Transitions, including held-out ones."""
    n_updates: Count = 5_000
    """Gradient steps."""
    steps_left: Count = 300
    """Least steps left in the episode for a return to be compared."""
    device: str = "cpu"
    """Device to learn on."""
    threads: Count = 1
    """Threads that torch may use."""
    progress: bool = False
    """Show a bar while learning."""


def returns(data: TensorDict) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the discounted return from each step to its episode's end, and the steps left."""
    value, left, n_left = 0.0, [], 0
    out = []
    rewards, ends = data["next", "reward"][:, 0].tolist(), data["next", "done"][:, 0].tolist()
    for reward, end in zip(reversed(rewards), reversed(ends), strict=True):
        value, n_left = (reward, 1) if end else (reward + GAMMA * value, n_left + 1)
        out.append(value)
        left.append(n_left)
    return torch.tensor(out[::-1]), torch.tensor(left[::-1])


def split(data: TensorDict) -> tuple[TensorDict, TensorDict]:
    """Split off the last fifth of the episodes."""
    ends = data["next", "done"][:, 0].nonzero()[:, 0] + 1
    if len(ends) < 5:
        raise SystemExit(f"{len(data)} steps hold {len(ends)} whole episodes; collect at least 5")
    cut, last = int(ends[len(ends) - len(ends) // 5 - 1]), int(ends[-1])
    return data[:cut], data[cut:last]


def make_predictor(data: TensorDict, action_space: gym.Space) -> RewardPredictor:
    dim = data["observation"].shape[-1]
    return RewardPredictor(
        model=ProbabilisticEnsemble(
            gym.spaces.Box(-math.inf, math.inf, (dim,)), None, action_space
        ),
        val_func=ValueNet(dim, 0),
        rew_func=RewardNet(dim, 0, action_space),
        encoder=IdentityEncoder((dim,)),
        latent_state_dim=dim,
        gamma=GAMMA,
    )


@torch.no_grad()
def correlation(predictor: RewardPredictor, data: TensorDict, steps_left: int) -> float:
    """Return the correlation of values and returns, for steps with enough steps left."""
    after, left = returns(data)
    enough = left >= steps_left
    value = predictor.value(data["observation"][enough])
    return torch.corrcoef(torch.stack([value, after[enough]]))[0, 1].item()


@torch.no_grad()
def reward_r2(predictor: RewardPredictor, data: TensorDict) -> float:
    """Return the share of the reward's variance that is predicted."""
    reward = data["next", "reward"].squeeze(-1)
    error = predictor.predict_reward(data["observation"], data["action"]) - reward
    return 1.0 - (error.square().mean() / reward.var(correction=0)).item()


def covered(train: TensorDict, test: TensorDict) -> torch.Tensor:
    """Return which test steps are within the range of the training data, in every dimension."""
    low, high = train["observation"].amin(0), train["observation"].amax(0)
    return ((test["observation"] >= low) & (test["observation"] <= high)).all(-1)


def main(config: Config) -> None:
    """Print one row for each seed."""
    torch.set_num_threads(config.threads)
    print(
        f"{'seed':>4} {'reward R2':>10} {'in range':>9} {'(share)':>8} {'value corr':>11} "
        f"{'(learned)':>10} {'ms/update':>10}"
    )
    for seed in config.seeds:
        train, test = split(collect(config.task, config.n_steps, seed))
        torch.manual_seed(seed)
        predictor = make_predictor(train, gym.make(config.task).action_space).to(config.device)
        ms = learn_all(predictor, train, config.n_updates, progress=config.progress)
        predictor.eval()
        inside = covered(train, test)
        print(
            f"{seed:4} {reward_r2(predictor, test):10.4f} "
            f"{reward_r2(predictor, test[inside]):9.4f} {inside.float().mean():8.2f} "
            f"{correlation(predictor, test, config.steps_left):11.3f} "
            f"{correlation(predictor, train, config.steps_left):10.3f} {ms:10.1f}",
            flush=True,
        )


if __name__ == "__main__":
    command(main, Config, __doc__)
