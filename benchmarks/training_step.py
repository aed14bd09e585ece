"""Time of a gradient step of the ensemble, compared with its matrix products alone.

    python benchmarks/training_step.py
    pip install mbrl && python benchmarks/training_step.py --with-mbrl    # compares mbrl-lib, too

Five members on a shared batch of 256: the loss, its gradients and Adam, without and with
`ModelLoss.compile()`. The products are those of the forward and the backward pass, in float32.
mbrl-lib's step is `GaussianMLP.update` with the same widths on a batch of the same size. Every time
is the median of runs that take turns in one process; the ratio is what matters.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import gymnasium
import torch
from rollout import ACTION, STATE, Case, medians
from tensordict import TensorDict

from layeredrl_torchrl import ModelLoss
from layeredrl_torchrl.runs import Count, command

N_MODELS, BATCH = 5, 256
# Upper limits in milliseconds, for a machine where mbrl-lib took 2.4 and 7.8.
CASES = {"2x128": ((128, 128), 2.0), "4x200": ((200,) * 4, 6.5)}


@dataclass
class Config:
    """Options of the benchmark."""

    repeats: Count = 80
    """Runs per median."""
    threads: Count = 1
    """Threads that torch may use."""
    device: str = "cpu"
    """Device to run on."""
    with_mbrl: bool = False
    """Whether to time mbrl-lib, too; it must be installed."""


def our_step(hidden: tuple[int, ...], device: str, *, compiled: bool) -> Callable[[], None]:
    """Return one gradient step on a batch that all members share."""
    torch.manual_seed(0)
    model = Case(n_models=N_MODELS, hidden=hidden).ensemble(device)
    loss_module = ModelLoss(model)
    if compiled:
        loss_module.compile(dynamic=False)
    optim = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    state = torch.randn(BATCH, STATE, device=device)
    batch = TensorDict(
        {
            "state": state,
            "context": state[:, :0],
            "action": torch.rand(BATCH, ACTION, device=device),
            "next": {
                "state": state + 0.1 * torch.randn_like(state),
                "terminated": torch.zeros(BATCH, 1, dtype=torch.bool, device=device),
            },
        },
        batch_size=[BATCH],
    )

    def step() -> None:
        loss = loss_module(batch)
        optim.zero_grad()
        (loss["loss_dynamics"] + loss["loss_termination"]).backward()
        optim.step()

    return step


def products(hidden: tuple[int, ...], device: str) -> Callable[[], None]:
    """The work that every step needs: each layer, and its gradients by weights and by inputs."""
    sizes = (STATE + ACTION, *hidden, 2 * STATE + 2)
    weights = [torch.randn(N_MODELS, *shape, device=device) for shape in pairwise(sizes)]
    rows = [torch.randn(N_MODELS, BATCH, size, device=device) for size in sizes]

    def run() -> None:
        for i, weight in enumerate(weights):
            torch.bmm(rows[i], weight)
            torch.bmm(rows[i].mT, rows[i + 1])
            if i:
                torch.bmm(rows[i + 1], weight.mT)

    return run


def mbrl_step(hidden: tuple[int, ...], device: str) -> Callable[[], object]:
    """The same step of mbrl-lib, which imports `gym`; its networks work with gymnasium."""
    sys.modules.setdefault("gym", gymnasium)
    sys.modules.setdefault("gym.wrappers", gymnasium.wrappers)
    from mbrl.models import GaussianMLP

    torch.manual_seed(0)
    model = GaussianMLP(
        STATE + ACTION,
        STATE,
        device,
        num_layers=len(hidden),
        ensemble_size=N_MODELS,
        hid_size=hidden[0],
        activation_fn_cfg={"_target_": "torch.nn.SiLU"},
    ).to(device)
    optim = torch.optim.Adam(model.parameters(), lr=1e-3)
    inputs = torch.randn(N_MODELS, BATCH, STATE + ACTION, device=device)
    targets = torch.randn(N_MODELS, BATCH, STATE, device=device)
    return lambda: model.update(inputs, optim, target=targets)


def main(config: Config) -> None:
    """Print the table."""
    torch.set_num_threads(config.threads)
    print(f"torch {torch.__version__}, {config.threads} threads, {config.device}; milliseconds")
    for name, (hidden, bar) in CASES.items():
        runs = {
            "products": products(hidden, config.device),
            "as it is": our_step(hidden, config.device, compiled=False),
            "compiled": our_step(hidden, config.device, compiled=True),
        }
        if config.with_mbrl:
            runs["mbrl-lib"] = mbrl_step(hidden, config.device)
        ms = medians(config.repeats, config.device, **runs)
        shown = ", ".join(f"{run} {value:.2f}" for run, value in ms.items())
        print(f"{name}: {shown} (bar {bar})")
        if config.with_mbrl:
            ratios = (f"{run} {ms[run] / ms['mbrl-lib']:.2f}" for run in ("as it is", "compiled"))
            print(f"{'':7}times mbrl-lib's: {', '.join(ratios)}")


if __name__ == "__main__":
    command(main, Config, __doc__)
