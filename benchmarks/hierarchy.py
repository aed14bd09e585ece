"""Time that a hierarchy adds to a step of the lower of its two levels.

    python benchmarks/hierarchy.py

There are 16 environments that cost almost nothing, a lower level of 2x128, and an upper level that
samples an action for every 10 steps of the lower one. A step is the policy's call and the
environment's step with its transforms, as in a collector; without the hierarchy, the lower level
reads the same input from the environment. The upper level acts in all environments at once, or in
each at its own time; this is slower, since then it acts in some of them at almost every step. Bar:
300 us. For scale, the time to set and get 100 entries of a TensorDict on the same machine. Times
are medians of blocks that take turns in one process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rollout import clock
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase, InitTracker, TransformedEnv

from layeredrl_torchrl import Hierarchy, Level
from layeredrl_torchrl.runs import Count, command

OBS, ACTION, SKILL, DURATION = 17, 6, 2, 10


@dataclass
class Config:
    """Options of the benchmark."""

    n_envs: Count = 16
    """Environments."""
    steps: Count = 100
    """Steps per block."""
    blocks: Count = 20
    """Blocks per median."""
    device: str = "cpu"
    """Device of levels and environments."""
    threads: Count = 1
    """Threads that torch may use."""


class Still(EnvBase):
    """An environment with constant observations and episodes of ``length`` steps."""

    def __init__(self, n: int, length: int, *, spread: bool) -> None:
        super().__init__(batch_size=[n])
        self.observation_spec = Composite(
            observation=Unbounded((n, OBS)), input=Unbounded((n, SKILL)), shape=[n]
        )
        self.action_spec = Bounded(-1.0, 1.0, (n, ACTION))
        self.reward_spec = Unbounded((n, 1))
        self.length, self.spread = length, spread
        self.left = torch.zeros(n, 1, dtype=torch.int64)
        self.observation, self.input = torch.randn(n, OBS), torch.zeros(n, SKILL)

    def _reset(self, tensordict, **_):
        reset = None if tensordict is None else tensordict.get("_reset", None)
        left = torch.full_like(self.left, self.length)
        if reset is None and self.spread:
            left = 1 + torch.arange(len(left)).unsqueeze(-1) % self.length
        self.left = left if reset is None else torch.where(reset, left, self.left)
        return TensorDict({"observation": self.observation, "input": self.input}, self.batch_size)

    def _step(self, tensordict):
        self.left = self.left - 1
        done = self.left == 0
        following = {
            "observation": self.observation,
            "input": self.input,
            "reward": torch.ones_like(self.left, dtype=torch.float32),
            "done": done,
            "terminated": done,
        }
        return TensorDict(following, self.batch_size)

    def _set_seed(self, seed):
        return seed


class Draw(Level):
    """Samples its action."""

    def forward(self, tensordict):
        return tensordict.set("action", self.action_spec.rand(tensordict.batch_size))

    def learn(self, data):
        return {}


class Net(Level):
    """Acts by a network of observation and input."""

    def _build(self, observation_space, action_spec):
        self.net = nn.Sequential(
            nn.Linear(OBS + SKILL, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(),
            nn.Linear(128, ACTION), nn.Tanh(),
        )  # fmt: skip

    def forward(self, tensordict):
        seen = torch.cat([tensordict.get("observation"), tensordict.get("input")], -1)
        return tensordict.set("action", self.net(seen))

    def learn(self, data):
        return {}


def make_lower() -> Level:
    lower = Net(input_spec=Bounded(-1.0, 1.0, (SKILL,)), duration=DURATION)
    lower.setup(Unbounded((OBS,)), Bounded(-1.0, 1.0, (ACTION,)))
    return lower


def stepping(config: Config, policy: Callable, *transforms, spread: bool) -> Callable[[], float]:
    """Make a function that runs a block of steps and returns the time of one, in microseconds."""
    env = TransformedEnv(Still(config.n_envs, 103, spread=spread), InitTracker())
    for transform in transforms:
        env.append_transform(transform)
    state = [env.reset()]

    @torch.no_grad()
    def block() -> None:
        td = state[0]
        for _ in range(config.steps):
            _, td = env.step_and_maybe_reset(policy(td))
        state[0] = td

    return lambda: 1e3 * clock(block, config.device) / config.steps


def touching(config: Config) -> float:
    """Return the time to set and get 100 entries, in microseconds."""
    value, td, begin = torch.zeros(16, 1), TensorDict({}, [16]), time.perf_counter()
    for _ in range(100):
        td.set("entry", value)
        td.get("entry")
    return 1e6 * (time.perf_counter() - begin)


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    torch.set_default_device(config.device)
    runs = {}
    for name, spread in (("together", False), ("each at its own time", True)):
        lower = make_lower()
        env = Still(config.n_envs, 103, spread=spread)
        hierarchy = Hierarchy([Draw(), make_lower()], env)
        runs[name, "lower"] = stepping(config, lower, spread=spread)
        transform = hierarchy.make_tensordict_primer()
        runs[name, "hierarchy"] = stepping(config, hierarchy, transform, spread=spread)
    runs["", "touch"] = lambda: touching(config)
    times = {key: [] for key in runs}
    for _ in range(config.blocks + 1):
        for key, run in runs.items():
            times[key].append(run())
    medians = {key: statistics.median(taken[1:]) for key, taken in times.items()}
    for name in ("together", "each at its own time"):
        alone, whole = medians[name, "lower"], medians[name, "hierarchy"]
        more = whole - alone
        print(f"{name}: {alone:.0f} us alone, {whole:.0f} us in the hierarchy, {more:+.0f} us")
    print(f"100 times set and get of a TensorDict: {medians['', 'touch']:.0f} us")


if __name__ == "__main__":
    command(main, Config, __doc__)
