"""Time of one update of `RewardPredictor.learn`: its parts, and its growth with the buffer.

    python benchmarks/predictor_learn.py                     # all tables
    python benchmarks/predictor_learn.py --threads 1 --rows 20000 200000 --repeats 9

State 17, action 6, both batches 256, networks of 2 x 128, otherwise default settings; with and
without compiled losses. Every time is the median over several calls of `learn` in one process,
where all cases take turns. A call's time is divided by its updates, so work that `learn` does once
per call is included proportionally. The breakdown times the parts of an update in the same calls
(without the parts that are nested in them), so its sum is a little above the time without clocks.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
from tensordict import TensorDict
from torchrl.data import Bounded, LazyMemmapStorage, TensorDictReplayBuffer, Unbounded

from layeredrl_torchrl import (
    IdentityEncoder,
    ModelLoss,
    PredictorLoss,
    ProbabilisticEnsemble,
    ProbFCDynamics,
    RewardNet,
    RewardPredictor,
    TransitionSlices,
    ValueNet,
)
from layeredrl_torchrl.predictors import _updates as updates
from layeredrl_torchrl.predictors._experience import Experience
from layeredrl_torchrl.predictors._upkeep import Upkeep
from layeredrl_torchrl.runs import Count, command

STATE, ACTION, BATCH = 17, 6, 256
# LayeredRL's times on two cores of an Intel Xeon, and our upper limits.
BARS = {"a": (13.4, 4.0), "b": (18.0, 6.0)}
CASES = {
    "a": ("5 members, 1 mode, k 1, n 3", {"n_modes": 1, "k_steps": 1, "n_steps": 3}),
    "b": ("5 members, 4 modes, k 3, n 2", {"n_modes": 4, "k_steps": 3, "n_steps": 2}),
}


@dataclass
class Config:
    """Options of the benchmark."""

    repeats: Count = 7
    """Calls of `learn` per median."""
    n_updates: Count = 200
    """Updates per call."""
    rows: tuple[Count, ...] = (20_000, 200_000, 2_000_000)
    """Numbers of stored steps to compare; the other tables use the first."""
    device: str = "cpu"
    """Device to learn on."""
    threads: Count = 1
    """Threads that torch may use."""


def make_buffer(n_rows: int, folder: str) -> TensorDictReplayBuffer:
    """Make a memory-mapped buffer of random-walk episodes of 1,000 steps."""
    buffer = TensorDictReplayBuffer(storage=LazyMemmapStorage(n_rows, scratch_dir=folder))
    generator = torch.Generator().manual_seed(0)
    for start in range(0, n_rows, 100_000):
        n = min(100_000, n_rows - start)
        obs = torch.randn(n + 1, STATE, generator=generator)
        end = (torch.arange(1, n + 1) % 1000 == 0).unsqueeze(-1)
        buffer.extend(
            TensorDict(
                {
                    "observation": obs[:-1],
                    "action": 2 * torch.rand(n, ACTION, generator=generator) - 1,
                    "next": {
                        "observation": obs[1:],
                        "reward": torch.randn(n, 1, generator=generator),
                        "terminated": torch.zeros_like(end),
                        "done": end,
                    },
                },
                batch_size=[n],
            )
        )
    return buffer


def make_predictor(
    n_modes: int, k_steps: int, n_steps: int, *, device: str, compiled: bool = False
) -> RewardPredictor:
    torch.manual_seed(0)
    action = Bounded(-1.0, 1.0, (ACTION,))
    model = ProbabilisticEnsemble(
        state_space=Unbounded((STATE,)),
        context_space=None,
        action_space=action,
        partial_net=partial(ProbFCDynamics, hidden_sizes=(128, 128)),
        n_models=5,
        n_modes=n_modes,
    )
    predictor = RewardPredictor(
        model=model,
        val_func=ValueNet(STATE, 0),
        rew_func=RewardNet(STATE, 0, action),
        encoder=IdentityEncoder((STATE,)),
        latent_state_dim=STATE,
        k_steps=k_steps,
        n_steps=n_steps,
    ).to(device)
    if compiled:
        predictor.model_loss.compile()
        predictor.predictor_loss.compile()
    return predictor


def medians(
    config: Config, runs: dict[str, tuple[RewardPredictor, TensorDictReplayBuffer]]
) -> dict[str, float]:
    """Median milliseconds per update of each predictor on its buffer; they take turns."""
    times: dict[str, list[float]] = defaultdict(list)
    for turn in range(config.repeats + 1):
        for name, (predictor, buffer) in runs.items():
            start = time.perf_counter()
            predictor.learn(buffer, config.n_updates, BATCH, BATCH, 0)
            if turn:
                times[name].append((time.perf_counter() - start) / config.n_updates * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


class Clocks:
    """Seconds spent in each part, without the parts that it calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    def around(self, name: str, call: Callable) -> Callable:
        """Return `call` with its time added to that of `name`."""

        def timed(*args, **kwargs):
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                spent = time.perf_counter() - start
                self.seconds[name] += spent - self._inner.pop()
                self._inner[-1] += spent

        return timed


@contextmanager
def clocked(clocks: Clocks, predictor: RewardPredictor) -> Iterator[None]:
    """Time the parts of an update."""
    parts = [
        (TransitionSlices, "sample", "sampling"),
        (Experience, "encode", "preparing"),
        (ModelLoss, "prepare", "preparing"),
        (ModelLoss, "terms", "model, loss"),
        (type(predictor.model), "predict_normalized", "model, forward"),
        (PredictorLoss, "prepare", "preparing"),
        (PredictorLoss, "terms", "reward and value, loss"),
        (torch.Tensor, "backward", "backward"),
        (updates.Updates, "_clip", "clipping"),
        (type(predictor.optim), "step", "optimizer"),
        (Upkeep, "refit", "statistics and calibration"),
        (Upkeep, "calibrate", "statistics and calibration"),
    ]
    with ExitStack() as stack:
        for owner, attribute, name in parts:
            timed = clocks.around(name, getattr(owner, attribute))
            stack.enter_context(patch.object(owner, attribute, timed))
        yield


def breakdown(config: Config, predictor: RewardPredictor, buffer: TensorDictReplayBuffer) -> None:
    """Print the milliseconds per update of every part."""
    per_call = []
    for _ in range(config.repeats):
        clocks = Clocks()
        with clocked(clocks, predictor):
            clocks.around("the rest", predictor.learn)(buffer, config.n_updates, BATCH, BATCH, 0)
        per_call.append({k: v / config.n_updates * 1e3 for k, v in clocks.seconds.items()})
    names = sorted(per_call[0], key=lambda name: -per_call[0][name])
    for name in names:
        print(f"    {name:30} {statistics.median(call[name] for call in per_call):6.2f}")


def main(config: Config) -> None:
    """Print the tables."""
    torch.set_num_threads(config.threads)
    where = f"{config.threads} threads, {config.device}"
    print(f"torch {torch.__version__}, {where}; milliseconds an update")
    build = partial(make_predictor, device=config.device)
    with tempfile.TemporaryDirectory() as folder:
        buffers = {n: make_buffer(n, f"{folder}/{n}") for n in config.rows}
        first = buffers[config.rows[0]]
        predictors = {
            name: make_predictor(**options, device=config.device)
            for name, (_, options) in CASES.items()
        }
        compiled = {
            f"{name} compiled": build(**options, compiled=True)
            for name, (_, options) in CASES.items()
        }
        ms = medians(config, {name: (p, first) for name, p in (predictors | compiled).items()})
        for name, (what, _) in CASES.items():
            theirs, bar = BARS[name]
            print(
                f"({name}) {what}: {ms[name]:.2f}, compiled {ms[f'{name} compiled']:.2f} (bar "
                f"{bar:.1f}; LayeredRL {theirs:.1f}, {theirs / ms[name]:.1f} times ours)"
            )
            breakdown(config, predictors[name], first)
        growing = {str(n): (build(**CASES["a"][1]), b) for n, b in buffers.items()}
        ms = medians(config, growing)
        print("(a) with this many stored steps:")
        for n, value in ms.items():
            print(f"    {int(n):>10,} {value:6.2f}  {value / ms[str(config.rows[0])]:.2f} times")


if __name__ == "__main__":
    command(main, Config, __doc__)
