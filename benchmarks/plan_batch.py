"""Time of one plan for several environments beside one plan for one.

    python benchmarks/plan_batch.py --threads 2

The networks and planner of `examples/planning_with_model.py` at its default settings, untrained;
medians of plans that take turns in one process.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rollout import medians
from tensordict import TensorDict

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from planning_with_model import Config as DemoConfig
from planning_with_model import make_env, make_policy, make_predictor


@dataclass
class Config:
    """Options of the benchmark."""

    repeats: int = 15
    """Runs that a median is taken over."""
    threads: int = 2
    """Threads that torch may use."""


@torch.no_grad()
def main(config: Config) -> None:
    """Print the times and their ratios."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    demo = DemoConfig()
    predictor = make_predictor(demo, make_env(demo.env, 1))
    policy = make_policy(demo, predictor)

    def plan(n: int) -> TensorDict:
        memory = policy.optimizer.forget([n])
        obs = 0.01 * torch.randn(n, 4)
        return policy(TensorDict(observation=obs, planner=memory, batch_size=[n]))

    ms = medians(config.repeats, "cpu", **{f"{n}": lambda n=n: plan(n) for n in (1, 2, 4, 8)})
    for n, value in ms.items():
        print(f"one plan for {n}: {value:7.2f} ms, {value / ms['1']:.2f} times one plan for 1")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
