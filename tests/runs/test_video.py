"""Videos of real episodes, and what is said where there can be none."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from dataclasses import replace

import gymnasium as gym
import imageio
import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule

from layeredrl_torchrl import get_task, make_batched
from layeredrl_torchrl.runs._video import check_rendering, record


class Pushing(torch.nn.Module):
    """A poor controller, which notes what it sees: cart, angle and their velocities."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, obs):
        self.seen.append(obs[0].double().numpy())
        gc.collect()
        return torch.full_like(obs[..., :1], 0.5)


def lose_a_renderer():
    """Leave one that has drawn to the garbage collector."""
    env = get_task("InvertedPendulum-v5").make_gym(render_mode="rgb_array")
    env.reset()
    env.render()
    env.close()
    env.itself = env


def small(picture):
    """Means of 2 x 2 pixels, by numpy."""
    return picture.reshape(240, 2, 240, 2, 3).mean((1, 3))


@pytest.mark.usefixtures("renders")
@pytest.mark.parametrize(("fps", "skip"), [(25, 1), (50, 2), (60, 3)])
def test_every_picture_is_that_of_its_step(fps, skip, tmp_path, monkeypatch):
    """Against gymnasium's own pictures of the same episode; at most 25 a second are kept.

    A renderer that was lost before and is collected meanwhile leaves them as they are.
    """
    env = make_batched("InvertedPendulum-v5", 1, seed=3, render_mode="rgb_array")
    monkeypatch.setitem(env.base_env._env.metadata, "render_fps", fps)
    controller = Pushing()
    policy = TensorDictModule(controller, ["observation"], ["action"])
    lose_a_renderer()
    record(env, policy, tmp_path / "video.gif", "cpu")
    with imageio.get_reader(tmp_path / "video.gif") as reader:
        video = [frame[..., :3].astype(float) for frame in reader]
        assert reader.get_meta_data()["duration"] == pytest.approx(1000 * skip / fps)
    assert os.listdir(tmp_path) == ["video.gif"]

    del env, policy
    gc.collect()
    other = get_task("InvertedPendulum-v5").make_gym(render_mode="rgb_array")
    other.reset()
    pictures = []
    for cart, angle, *speeds in controller.seen:
        other.unwrapped.set_state(np.array([cart, angle]), np.array(speeds))
        pictures.append(small(other.render()))
    other.close()
    assert len(video) == (len(pictures) + 1) // skip  # the last one is that of the end
    expected = range(skip - 1, len(pictures), skip)
    assert len(expected) > 1
    for frame, step in zip(video, expected, strict=False):  # of 256 colours, so not equal
        assert np.argmin([np.abs(frame - picture).mean() for picture in pictures]) == step


class Blind(gym.Env):
    """Draws nothing."""

    observation_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def render(self):
        return None


class Deaf(Blind):
    """Does not know the word."""

    def __init__(self):
        super().__init__()


def test_a_task_without_pictures_is_named():
    task = get_task("InvertedPendulum-v5")
    with pytest.raises(RuntimeError, match=r"InvertedPendulum-v5 does not draw pictures"):
        check_rendering(replace(task, make_gym=Blind))
    with pytest.raises(RuntimeError, match=r"cannot be rendered here \(TypeError: .*render_mode"):
        check_rendering(replace(task, make_gym=Deaf))


def test_a_machine_that_cannot_draw_says_so_at_the_start():
    """In a process of its own, in which nobody has drawn yet, by GLFW without a screen."""
    code = "from layeredrl_torchrl.runs import RunOptions; RunOptions(video=True).check()"
    environment = {k: v for k, v in os.environ.items() if "DISPLAY" not in k}
    environment |= {"MUJOCO_GL": "glfw", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert "--video: InvertedPendulum-v5 cannot be rendered here" in done.stderr.splitlines()[-1]
