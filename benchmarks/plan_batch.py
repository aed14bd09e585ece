"""Time of one plan for several environments, compared with one plan for one environment.

    python benchmarks/plan_batch.py --threads 2

Uses the networks and planner of `examples/planning_with_model.py` with its default settings,
untrained. Times are medians of plans that take turns in one process.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from rollout import medians
from tensordict import TensorDict

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from planning_with_model import Config as DemoConfig
from planning_with_model import make_env, make_planner, make_predictor

from layeredrl_torchrl.runs import Count, command


@dataclass
class Config:
    """Options of the benchmark."""

    repeats: Count = 15
    """Runs per median."""
    device: str = "cpu"
    """Device to plan on."""
    threads: Count = 1
    """Threads that torch may use."""


@torch.no_grad()
def main(config: Config) -> None:
    """Print the times and their ratios."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    demo = DemoConfig(device=config.device)
    predictor = make_predictor(demo, make_env(demo, 1, 0))
    policy = make_planner(demo, predictor).to(config.device)

    def plan(n: int) -> TensorDict:
        obs = 0.01 * torch.randn(n, 4, device=config.device)
        return policy(policy.forget([n], device=config.device).set("observation", obs))

    plans = {f"{n}": lambda n=n: plan(n) for n in (1, 2, 4, 8)}
    ms = medians(config.repeats, config.device, **plans)
    for n, value in ms.items():
        print(f"one plan for {n}: {value:7.2f} ms, {value / ms['1']:.2f} times one plan for 1")


if __name__ == "__main__":
    command(main, Config, __doc__)
