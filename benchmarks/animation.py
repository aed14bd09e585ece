"""An animation of a policy that plans: real motion and predicted plans."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import imageio
import matplotlib.pyplot as plt
import numpy as np
import torch
from torchrl.envs import EnvBase

WIDTH, HEIGHT, CHART, DPI = 480, 200, 160, 100
BLUE, ORANGE, LIGHT = "#2a6fbb", "#d9722b", 244


class Camera:
    """A bright, wide picture `[HEIGHT, WIDTH, 3]` from the side; the camera follows the body."""

    def __init__(self, env: EnvBase) -> None:
        import mujoco

        world = env.base_env._env.unwrapped
        self.data, self.camera = world.data, mujoco.MjvCamera()
        world.model.vis.headlight.ambient[:] = 0.55
        self.renderer = mujoco.Renderer(world.model, HEIGHT, WIDTH)
        self.camera.type, self.camera.trackbodyid = mujoco.mjtCamera.mjCAMERA_TRACKING, 1
        self.camera.azimuth, self.camera.elevation = 90.0, -8.0
        self.camera.distance = max(0.9 * world.model.stat.extent, 1.0)

    def picture(self) -> np.ndarray:
        self.renderer.update_scene(self.data, self.camera)
        picture = self.renderer.render().copy()
        self.renderer.enable_segmentation_rendering()
        behind = self.renderer.render()[..., 0] < 0  # background
        self.renderer.disable_segmentation_rendering()
        picture[behind] = LIGHT
        return picture


class Stage:
    """The figure of a frame: above the picture, below one dimension of the state over time."""

    def __init__(self, title: str, name: str, n_members: int, dt: float, n_steps: int) -> None:
        size = WIDTH / DPI, (HEIGHT + CHART) / DPI
        self.figure, self.dt = plt.figure(figsize=size, dpi=DPI, facecolor="white"), dt
        share = CHART / (HEIGHT + CHART)
        top = self.figure.add_axes((0, share, 1, 1 - share))
        top.axis("off")
        self.picture = top.imshow(np.full((HEIGHT, WIDTH, 3), LIGHT, np.uint8), aspect="auto")
        top.text(0.02, 0.95, title, va="top", fontsize=9, transform=top.transAxes)
        place = {"va": "top", "fontsize": 9, "family": "monospace"}
        self.text = top.text(0.02, 0.84, "", transform=top.transAxes, **place)
        self.chart = self.figure.add_axes((0.13, 0.3 * share, 0.85, 0.6 * share))
        (self.real,) = self.chart.plot([], [], color=BLUE, lw=1.5, label="what happened")
        self.imagined = [self.chart.plot([], [], color=ORANGE, lw=1)[0] for _ in range(n_members)]
        self.imagined[0].set_label("imagined by each member, along the plan")
        self.chart.set_xlim(0, n_steps * dt)
        self.chart.set_ylabel(name, fontsize=7)
        self.chart.set_xlabel("seconds", fontsize=7, labelpad=1)
        self.chart.tick_params(labelsize=6)
        self.chart.grid(alpha=0.3)
        self.chart.spines[["top", "right"]].set_visible(False)
        place = {"loc": "lower right", "bbox_to_anchor": (1.0, 0.97), "borderaxespad": 0}
        self.chart.legend(fontsize=7, ncols=2, frameon=False, **place)

    def frame(
        self, picture: np.ndarray, real: list[float], imagined: np.ndarray, gain: float
    ) -> np.ndarray:
        """The frame after values `real`, with the next values that members predict, `[M, H]`."""
        now = len(real) - 1
        self.picture.set_data(picture)
        self.text.set_text(f"step {now}, return {gain:.0f}")
        self.real.set_data(np.arange(now + 1) * self.dt, real)
        ahead = (now + np.arange(imagined.shape[1] + 1)) * self.dt
        for line, values in zip(self.imagined, imagined, strict=True):
            line.set_data(ahead, [real[-1], *values])
        self.figure.canvas.draw()
        return np.asarray(self.figure.canvas.buffer_rgba())[..., :3].copy()


@torch.no_grad()
def animation(task, policy, path: Path, seed: int, max_steps: int = 150) -> None:
    """Animate one episode and its plans; if MuJoCo cannot render, say why in one line."""
    env = task.make(seed=seed)
    env.append_transform(policy.make_tensordict_primer())
    try:
        camera = Camera(env)
        pictures = [camera.picture()]
    except Exception as error:  # noqa: BLE001 - each rendering backend fails in its own way
        backend = os.environ.get("MUJOCO_GL", "not set")
        reason = (str(error).splitlines() or [""])[0]
        print(
            f"No animation: MuJoCo cannot render here ({type(error).__name__}: {reason}; "
            f"MUJOCO_GL is {backend}, try egl or osmesa)"
        )
        return
    plans: list[torch.Tensor] = []
    policy.callback = lambda traj: plans.append(traj["action"][0, 0])  # [H, A], of the first member
    data, states, gains = env.reset(), [], [0.0]
    pictures = []
    for _ in range(max_steps):
        pictures.append(camera.picture())
        states.append(data["observation"].clone())
        data = env.step(policy(data))["next"]
        gains.append(gains[-1] + data["reward"].item())
        if data["done"].any():
            break
    policy.callback = None
    dt, seen = env.base_env._env.unwrapped.dt, torch.stack(states)
    traj = policy.predictor.rollout(seen, torch.stack(plans), deterministic=True)
    # An angle if there is one, else the dimension that varies most.
    names = task.names_of(range(task.observation_dim))
    angles = [i for i, name in enumerate(names) if "angle" in name and "[rad]" in name]
    d = angles[0] if angles else int(seen.std(0).argmax())
    values = seen[:, d].numpy()
    ahead = traj["next", "state"][..., d].mean(2).numpy()  # [T, M, H]
    every = 2
    stage = Stage(
        f"{task.name}: planning in a learned model",
        names[d],
        ahead.shape[1],
        dt,
        len(values) + ahead.shape[2],
    )
    low, high = np.quantile(np.append(values, ahead), (0.002, 0.998))
    margin = 0.1 * max(high - low, 1e-3)
    stage.chart.set_ylim(low - margin, high + margin)
    frames = [
        stage.frame(pictures[t], values[: t + 1].tolist(), ahead[t], gains[t])
        for t in range(0, len(values), every)
    ]
    env.close()
    plt.close(stage.figure)
    imageio.mimsave(path, frames, duration=1000 * dt * every, loop=0)
