"""The pictures of the examples: learning curves, predictions with their uncertainty, animations."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from tensordict import TensorDict
from torchrl.envs import DoubleToFloat, GymEnv, TransformedEnv

BLUE, ORANGE, GREY = "#2a6fbb", "#d9722b", "#888888"


def _finish(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def learning_curve(rows: list[dict[str, float]], evaluation: float, path: Path, title: str) -> None:
    """Returns of episodes that ended and that go on, and the model's fit, against real steps."""
    steps = np.array([row["env_steps"] for row in rows])
    ended = np.array([row["episodes"] for row in rows]) > 0
    returns = np.array([row["return"] for row in rows])
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5.5), sharex=True, height_ratios=(2, 1))
    so_far = [row["return_so_far"] for row in rows]
    top.plot(steps, so_far, color=GREY, lw=1.2, label="episodes under way, return so far")
    top.plot(
        steps[ended], returns[ended], "o", color=BLUE, markersize=5, label="episodes that ended"
    )
    top.plot(
        steps[-1],
        evaluation,
        "*",
        color=ORANGE,
        markersize=14,
        clip_on=False,
        label=f"final evaluation: {evaluation:.0f}",
    )
    top.set_ylabel("return")
    top.set_title(f"{title}: planned in a model learned from scratch", fontsize=11)
    top.legend(fontsize=8, frameon=False)
    bottom.plot(steps, [row["nll"] for row in rows], color=ORANGE)
    bottom.set_ylabel("model's NLL\n[nats per dimension]")
    bottom.set_xlabel("real environment steps")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    _finish(figure, path)


@torch.no_grad()
def prediction(predictor, played: TensorDict, path: Path, title: str, horizon: int = 40) -> None:
    """Open-loop prediction from one real observation against what really happened.

    `played` is experience `[E, T]`; the longest unbroken stretch of its first steps is shown.
    """
    alive = ~played["next", "done"].squeeze(-1)
    lengths = alive.int().cumprod(-1).sum(-1) + 1
    episode = int(lengths.argmax())
    start = 10 if lengths[episode] > horizon + 10 else 0
    steps = min(horizon, int(lengths[episode]) - start)
    real = played[episode, start : start + steps]
    model = predictor.model
    n_particles, model.n_particles_per_model = model.n_particles_per_model, 50
    traj = predictor.rollout(real["observation"][0], real["action"])
    model.n_particles_per_model = n_particles
    state, _ = predictor.encode(real["next", "observation"])
    parts = model.uncertainty(traj)
    mean = parts["mean"].numpy()
    epistemic = parts["epistemic_var"].numpy()
    total = epistemic + parts["aleatoric_var"].numpy()
    # The dimensions that move most, in units of what they do in this stretch.
    shown = state.std(0).argsort(descending=True)[:4].sort().values.tolist()
    time = np.arange(1, steps + 1)
    figure, axes = plt.subplots(len(shown), 1, figsize=(7, 1.8 * len(shown) + 0.8), sharex=True)
    for axis, d in zip(np.atleast_1d(axes), shown, strict=True):
        for variance, alpha, label in (
            (total, 0.2, "± 2 std, all particles"),
            (epistemic, 0.35, "± 2 std between members"),
        ):
            width = 2 * np.sqrt(variance[:, d])
            axis.fill_between(
                time,
                mean[:, d] - width,
                mean[:, d] + width,
                color=BLUE,
                alpha=alpha,
                lw=0,
                label=label,
            )
        axis.plot(time, mean[:, d], color=BLUE, label="predicted mean")
        axis.plot(time, state[:, d], color="black", lw=1.2, ls="--", label="real")
        axis.set_ylabel(f"state {d}")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        low, high = float(state[:, d].min()), float(state[:, d].max())
        margin = 1.0 * max(high - low, 1e-3)
        axis.set_ylim(low - margin, high + margin)
    axes = np.atleast_1d(axes)
    axes[0].legend(
        fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False
    )
    axes[-1].set_xlabel(f"steps ahead, open loop ({title})")
    _finish(figure, path)


@torch.no_grad()
def animation(name: str, policy, path: Path, seed: int, max_steps: int = 150) -> None:
    """An animated picture of one episode; says in one line why where MuJoCo cannot render."""
    import imageio

    try:
        env = TransformedEnv(GymEnv(name, from_pixels=True, pixels_only=False), DoubleToFloat())
        env.append_transform(policy.make_tensordict_primer())
        env.set_seed(seed)
        data = env.reset()
    except Exception as error:  # noqa: BLE001 - each rendering backend fails in its own way
        backend = os.environ.get("MUJOCO_GL", "not set")
        reason = (str(error).splitlines() or [""])[0]
        print(
            f"No animation: MuJoCo cannot render here ({type(error).__name__}: {reason}; "
            f"MUJOCO_GL is {backend}, try egl or osmesa)"
        )
        return
    frames = []
    for _ in range(max_steps):
        frames.append(data["pixels"].numpy()[::2, ::2])
        data = env.step(policy(data))["next"]
        if data["done"].any():
            break
    env.close()
    imageio.mimsave(path, frames[::2], duration=40, loop=0)
