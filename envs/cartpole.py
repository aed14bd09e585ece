"""A cart-pole in MuJoCo with a hanging pole that must be swung up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from numpy.typing import NDArray

__all__ = ["CartPoleSwingUpEnv"]

_XML = Path(__file__).resolve().parent / "assets" / "cartpole_swingup.xml"


class CartPoleSwingUpEnv(MujocoEnv, gym.utils.EzPickle):
    """Swing a hanging pole up and balance it over the middle of the rail, at 25 Hz.

    ============  =====================================================================
    observation   ``[x, sin(angle), cos(angle), dx/dt, dangle/dt]``, ``[5]`` float64: m, m/s,
                  rad/s; the angle is 0 where the pole stands upright, and turns towards +x
    action        ``[1]`` in ``[-1, 1]``: ten newtons along the rail
    reward        ``(1 + cos(angle)) / 2 * exp(-x**2 / 2)``, in ``[0, 1]``, of the state in
                  which the action is *taken* (as in gymnasium's Pendulum)
    start         at rest in the middle, hanging, each coordinate off by a normal of std
                  ``reset_noise_scale``
    end           never terminates; the task's time limit truncates
    ============  =====================================================================

    The rail extends 1.8 m to either side. The force is enough to swing the pole (0.2 kg, 0.6 m) up
    in one or two strokes. The reward has no action cost: only the time of the swing-up limits the
    best return. An episode of 250 steps counts as solved at a return of 180; energy pumping with
    linear feedback at the top gets 219, random actions about 10.

    Args:
        reset_noise_scale: Standard deviation of the start, in the units of position and velocity.
        **kwargs: ``render_mode``, ``width`` and so on of gymnasium's ``MujocoEnv``.
    """

    metadata = {
        "render_modes": ["human", "rgb_array", "depth_array", "rgbd_tuple"],
        "render_fps": 25,
    }

    def __init__(self, reset_noise_scale: float = 0.05, **kwargs: Any) -> None:
        gym.utils.EzPickle.__init__(self, reset_noise_scale=reset_noise_scale, **kwargs)
        if not reset_noise_scale >= 0.0:
            raise ValueError(f"reset_noise_scale must be at least 0, got {reset_noise_scale}")
        self.reset_noise_scale = reset_noise_scale
        space = gym.spaces.Box(low=-np.inf, high=np.inf, shape=(5,), dtype=np.float64)
        super().__init__(
            str(_XML),
            frame_skip=2,
            observation_space=space,
            **{"camera_name": "side"} | kwargs,
        )

    def step(
        self, action: NDArray[np.float32]
    ) -> tuple[NDArray[np.float64], np.float64, bool, bool, dict[str, np.float64]]:
        """Apply ``action [1]`` for 0.04 s."""
        x, _, cos = self._observe()[:3]
        reward = (1.0 + cos) / 2.0 * np.exp(-(x**2) / 2.0)
        self.do_simulation(action, self.frame_skip)
        if self.render_mode == "human":
            self.render()
        return self._observe(), reward, False, False, {}

    def reset_model(self) -> NDArray[np.float64]:
        """Let the pole hang, with noise."""
        noise = self.reset_noise_scale * self.np_random.standard_normal(4)
        self.set_state(np.array([0.0, np.pi]) + noise[:2], noise[2:])
        return self._observe()

    def _observe(self) -> NDArray[np.float64]:
        x, angle = self.data.qpos
        return np.array([x, np.sin(angle), np.cos(angle), *self.data.qvel])
