"""Time of ensemble rollouts, compared with their matrix products alone.

    python benchmarks/rollout.py                    # the table, and a picture of the scaling
    python benchmarks/rollout.py --repeats 30 --threads 2 --output output/benchmarks

Every time is the median of several runs in one process; ours and the bare products take turns, and
the ratio is what matters. The products are the `torch.bmm`s of the forward passes, in float32.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import torch
from tensordict import TensorDict
from torch.profiler import ProfilerActivity, profile

from layeredrl_torchrl import (
    IdentityEncoder,
    ProbabilisticEnsemble,
    ProbFCDynamics,
    RewardNet,
    StaticPredictor,
)
from layeredrl_torchrl.runs import Count, command

STATE, ACTION = 17, 6


@dataclass
class Config:
    """Options of the benchmark."""

    repeats: Count = 15
    """Runs per median."""
    threads: Count = 1
    """Threads that torch may use."""
    device: str = "cpu"
    """Device to run on."""
    output: Path = Path("output/benchmarks")
    """Folder of the picture."""


@dataclass
class Case:
    """One rollout of `batch` states by `n_models` members with `n_particles` particles each."""

    batch: int = 256
    n_models: int = 5
    n_particles: int = 1
    horizon: int = 15
    hidden: tuple[int, ...] = (128, 128)
    n_modes: int = 1

    def ensemble(self, device: str) -> ProbabilisticEnsemble:
        """Make an ensemble with statistics of smooth dynamics: changes are a tenth of states."""
        box = partial(gym.spaces.Box, -float("inf"), float("inf"))
        model = ProbabilisticEnsemble(
            state_space=box((STATE,)),
            context_space=None,
            action_space=gym.spaces.Box(-1, 1, (ACTION,)),
            partial_net=partial(ProbFCDynamics, hidden_sizes=self.hidden),
            n_models=self.n_models,
            n_modes=self.n_modes,
            n_particles_per_model=self.n_particles,
        )
        state, action = torch.randn(1000, STATE), 2 * torch.rand(1000, ACTION) - 1
        model.fit_statistics(state, state[:, :0], action, state + 0.1 * torch.randn(1000, STATE))
        return model.to(device)

    def products(self, device: str) -> Callable[[], None]:
        """Return a function with the same chain of batched products, and nothing else."""
        sizes = (STATE + ACTION, *self.hidden, self.n_modes * (2 * STATE + 1) + 1)
        rows = self.batch * self.n_particles
        inputs = [torch.randn(self.n_models, rows, size, device=device) for size in sizes[:-1]]
        weights = [torch.randn(self.n_models, *shape, device=device) for shape in pairwise(sizes)]

        def run() -> None:
            for _ in range(self.horizon):
                for x, weight in zip(inputs, weights, strict=True):
                    torch.bmm(x, weight)

        return run


def clock(run: Callable[[], object], device: str) -> float:
    """Return the milliseconds of one run, until the device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)


def medians(repeats: int, device: str, **runs: Callable[[], object]) -> dict[str, float]:
    """Return the median milliseconds of each run; the runs take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 2):
        for name, run in runs.items():
            taken = clock(run, device)
            if turn >= 2:
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def rollout_runs(case: Case, device: str) -> dict[str, Callable[[], object]]:
    """Ours in float32, compiled (on a GPU in a CUDA graph), both in bfloat16; the products."""
    torch.manual_seed(0)
    model = case.ensemble(device)
    with_compile = copy.deepcopy(model)
    with_compile.compile(dynamic=False, cudagraphs=True)
    state = torch.randn(case.batch, STATE, device=device)
    actions = torch.rand(case.batch, case.horizon, ACTION, device=device) * 2 - 1

    @torch.no_grad()
    def fp32() -> TensorDict:
        return model.rollout(state, None, actions)

    @torch.no_grad()
    def compiled() -> TensorDict:
        return with_compile.rollout(state, None, actions)

    def bf16(run: Callable[[], object]) -> Callable[[], object]:
        return torch.autocast(device_type=torch.device(device).type, dtype=torch.bfloat16)(run)

    return {
        "products": torch.no_grad()(case.products(device)),
        "fp32": fp32,
        "compiled": compiled,
        "bf16": bf16(fp32),
        "compiled bf16": bf16(compiled),
    }


CASES = {
    "256 x 5 x 1, H 15, 2x128, 4 modes": Case(n_modes=4),
    "500 x 5 x 4, H 30, 4x200, 1 mode": Case(500, 5, 4, 30, (200,) * 4),
}


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the peak of live allocations during a run on the CPU, from torch's profiler."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = run()
    live = peak = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    del kept
    return peak


def memory() -> None:
    """Print the memory of a rollout compared with its result, and of sums over growing horizons."""
    box = partial(gym.spaces.Box, -float("inf"), float("inf"))
    for name, case in CASES.items():
        model = case.ensemble("cpu")
        state = torch.randn(case.batch, STATE)
        actions = torch.rand(case.batch, case.horizon, ACTION) * 2 - 1
        with torch.no_grad():
            traj = model.rollout(state, None, actions)
        parts = (traj["state"], traj["next", "term_prob"])
        returned = sum(part.untyped_storage().nbytes() for part in parts)
        peak = peak_bytes(lambda: model.rollout(state, None, actions))  # noqa: B023
        print(
            f"{name:36} rollout: {peak / 2**20:.1f} MiB at most for {returned / 2**20:.1f} "
            f"returned, {peak / returned:.2f} times"
        )
        predictor = StaticPredictor(
            model, None, RewardNet(STATE, 0, ACTION), IdentityEncoder(box((STATE,)).shape), STATE
        )
        peaks = []
        for horizon in (case.horizon, 2 * case.horizon, 4 * case.horizon):
            actions = torch.rand(case.batch, horizon, ACTION) * 2 - 1
            peaks.append(peak_bytes(lambda: predictor.returns(state, None, actions)))  # noqa: B023
        shown = ", ".join(f"{peak / 2**20:.1f}" for peak in peaks)
        print(f"{'':36} sums over 1, 2, 4 times the horizon: {shown} MiB at most")


def scaling(config: Config) -> None:
    """Plot how the time grows with batch, members, particles and horizon."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    words = {
        "batch": "states in the batch",
        "n_models": "members of the ensemble",
        "n_particles": "particles of each member",
        "horizon": "steps ahead",
    }
    axes_of = {
        "batch": (64, 128, 256, 512, 1024, 2048),
        "n_models": (1, 2, 4, 8, 16),
        "n_particles": (1, 2, 4, 8, 16),
        "horizon": (5, 10, 20, 40, 80),
    }
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.4))
    for axis, (name, values) in zip(axes, axes_of.items(), strict=True):
        rows = []
        for value in values:
            case = Case(**{"hidden": (200,) * 3, name: value})
            runs = rollout_runs(case, config.device)
            for way in ("compiled", "compiled bf16"):  # about twenty sizes would take minutes
                del runs[way]
            rows.append(medians(max(config.repeats // 3, 3), config.device, **runs))
        for run, color, label in (
            ("fp32", "#2a6fbb", "rollout, float32"),
            ("bf16", "#d9722b", "rollout, bfloat16"),
            ("products", "#888888", "its matrix products alone"),
        ):
            axis.plot(values, [row[run] for row in rows], "o-", color=color, label=label, ms=4)
        line = rows[-1]["fp32"]
        axis.plot(
            values,
            [line * v / values[-1] for v in values],
            ":",
            color="black",
            label="proportional",
        )
        axis.set(xscale="log", yscale="log", xlabel=words[name])
        axis.set_xticks(values, [str(value) for value in values])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds for a rollout")
    axes[0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    config.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.output / "rollout_scaling.png", dpi=110)
    print(f"scaling: {config.output / 'rollout_scaling.png'}")


def main(config: Config) -> None:
    """Print the table and draw the picture."""
    torch.set_num_threads(config.threads)
    print(f"torch {torch.__version__}, {config.threads} threads, {config.device}")
    ways = ("fp32", "compiled", "bf16", "compiled bf16")
    print(f"{'rollout':36} {'products':>9}" + "".join(f" {way:>13} {'ratio':>6}" for way in ways))
    for name, case in CASES.items():
        ms = medians(config.repeats, config.device, **rollout_runs(case, config.device))
        shown = "".join(f" {ms[way]:13.2f} {ms[way] / ms['products']:6.2f}" for way in ways)
        print(f"{name:36} {ms['products']:9.2f}{shown}")
    if config.device == "cpu":
        memory()
    scaling(config)


if __name__ == "__main__":
    command(main, Config, __doc__, needs=("matplotlib",))
