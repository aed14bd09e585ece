"""Record an episode as a video with TorchRL's ``VideoRecorder``."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.record import PixelRenderTransform, VideoRecorder

from layeredrl_torchrl.envs import Task
from layeredrl_torchrl.runs._files import staged
from layeredrl_torchrl.runs._playing import play_episodes

__all__ = ["check_rendering", "record"]

_FPS = 25  # at most
_HEIGHT = 240  # pixels, about


def check_rendering(task: Task) -> None:
    """Render one picture of a task.

    Raises:
        RuntimeError: The task or this machine cannot render; the message is one line.
    """
    if sys.platform == "linux" and not {"MUJOCO_GL", "DISPLAY"} & os.environ.keys():
        # Gymnasium tries GLFW, which needs a screen; EGL does not.
        with contextlib.suppress(OSError):
            ctypes.CDLL("libEGL.so.1")
            os.environ["MUJOCO_GL"] = "egl"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GLFW warns of the problem that the error describes
            env = task.make_gym(render_mode="rgb_array")
            env.reset(seed=0)
            picture = env.render()
            env.close()
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        backend = os.environ.get("MUJOCO_GL", "not set")
        raise RuntimeError(
            f"{task.name} cannot be rendered here ({type(error).__name__}: {reason}); MUJOCO_GL is "
            f"{backend}, try egl or osmesa"
        ) from error
    if np.ndim(picture) != 3:
        raise RuntimeError(f"{task.name} does not draw pictures (render_mode 'rgb_array')")


def record(
    env: EnvBase, policy: TensorDictModuleBase, path: Path, device: str | torch.device
) -> None:
    """Record an episode as an animated GIF in real time, with at most 25 frames per second.

    Args:
        env: One environment, batch size ``[]`` or ``[1]``, that renders "rgb_array"; closed at the
            end.
        policy: The policy; its primers are in the environment.
        path: The file.
        device: Device of the policy.

    Raises:
        RuntimeError: An environment that does not render.
    """
    mode = getattr(env, "render_mode", "rgb_array")
    if mode != "rgb_array":
        raise RuntimeError(
            f"the environment of the video has render_mode {mode!r}, which draws no pictures; let "
            "make_env pass on its render_mode="
        )
    # MuJoCo frees the resources of an unused renderer by number, in the current context. Later this
    # would free the resources of the new renderer, and pictures would be black.
    gc.collect()
    fps = env.metadata.get("render_fps") or _FPS
    skip = math.ceil(fps / _FPS)
    env.append_transform(PixelRenderTransform(preproc=_shrink))
    env.append_transform(
        VideoRecorder(
            _GifWriter(path),
            "video",
            skip=skip,
            make_grid=False,
            fps=fps / skip,
            dump_on_done=True,  # before the next episode begins
        )
    )
    play_episodes(env, policy, device)


class _GifWriter:
    """The part of a logger that the recorder uses; TorchRL's loggers need torchcodec or moviepy."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def log_video(self, name: str, video: Tensor, step: int, *, fps: float) -> None:
        """Write frames ``[1, T, 3, H, W]``."""
        import imageio

        frames = video[0].permute(0, 2, 3, 1).numpy()
        with staged(self.path) as stage:
            imageio.mimsave(stage, list(frames), format="GIF", duration=1000 / fps, loop=0)


def _shrink(pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Shrink n pictures ``[height, width, 3]`` to ``[n, 3, H, W]``, one to ``[3, H, W]``."""
    found = torch.from_numpy(np.stack(pictures)).movedim(-1, -3)
    factor = max(found.shape[-2] // _HEIGHT, 1)
    return torch.nn.functional.avg_pool2d(found.float(), factor).to(torch.uint8)
