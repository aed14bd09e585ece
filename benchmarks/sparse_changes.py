"""Are rare changes learned? A switch that one transition in twenty flips.

    python benchmarks/sparse_changes.py
    python benchmarks/sparse_changes.py --beta-nll 0    # the plain likelihood

A point drifts by a tenth of the action, and an action above 0.9 flips a switch, 0 or 1. A predictor
with default settings learns from 4,000 random transitions: in one call of ``learn``, and in many
short ones, as in a level. Prints the share of flips with an action above 0.93 that the predictor's
mean gets right; a model that neglects them has 0 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torchrl.data import Bounded, LazyTensorStorage, TensorDictReplayBuffer, Unbounded

from layeredrl_torchrl import PredictorFactory
from layeredrl_torchrl.runs import Count, Seed, Share, command

CALLS = (1, 30)


@dataclass
class Config:
    """Options of the benchmark."""

    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Seeds of data and training."""
    n_updates: Count = 3000
    """Gradient steps in total."""
    beta_nll: Share = 0.75
    """The predictor's `beta_nll`; 0 is the plain likelihood."""


def transitions(n: int) -> TensorDict:
    """Make ``n`` transitions of random actions from random states: two places, and a switch."""
    place, switch = torch.randn(n, 2), (torch.rand(n, 1) < 0.5).float()
    action = 2 * torch.rand(n, 1) - 1
    after = torch.cat([place + 0.1 * action, torch.where(action > 0.9, 1 - switch, switch)], -1)
    no = torch.zeros(n, 1, dtype=torch.bool)
    following = {"observation": after, "reward": 0.0 * action, "terminated": no, "done": no}
    now = {"observation": torch.cat([place, switch], -1), "action": action, "next": following}
    return TensorDict(now, [n])


def learned(seed: int, n_calls: int, config: Config) -> tuple[float, float]:
    """Return the share of flips that are predicted, and the last likelihood."""
    torch.manual_seed(seed)
    data = transitions(4000)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(len(data)))
    buffer.extend(data)
    factory = PredictorFactory(
        hidden_sizes=(64, 64), predictor_options={"beta_nll": config.beta_nll}
    )
    predictor = factory(Unbounded((3,)), Bounded(-1.0, 1.0, (1,)))
    for _ in range(n_calls):
        info = predictor.learn(buffer, max(config.n_updates // n_calls, 1), 8, 128, len(data))[1]
    flips = data[(data["action"] > 0.93).squeeze(-1)]
    mean = predictor.predict(flips["observation"], flips["action"])[0].mean((-3, -2))
    right = (mean[:, 2] > 0.5) == (flips["next", "observation"][:, 2] > 0.5)
    return right.float().mean().item(), info["nll"]


def main(config: Config) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print("| calls of learn x updates | seed | flips that are predicted | NLL of training |")
    print("|---|---|---|---|")
    for n_calls in CALLS:
        for seed in config.seeds:
            share, nll = learned(seed, n_calls, config)
            updates = max(config.n_updates // n_calls, 1)
            print(
                f"| {n_calls} x {updates} | {seed} | {100 * share:.0f} % | {nll:.2f} |", flush=True
            )


if __name__ == "__main__":
    command(main, Config, __doc__)
