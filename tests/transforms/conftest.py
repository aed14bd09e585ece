"""A small goal environment, and the ways in which environments are put together."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torchrl.envs import GymWrapper, SerialEnv, TransformedEnv

from layeredrl_torchrl.envs import SuccessReader


class Walk(gym.Env):
    """Counts its steps; everything it returns follows from the numbers it was built with.

    Args:
        length: Steps of an episode.
        reached: For each episode in turn (over and over) the step at which ``info["success"]`` is
            true, 0 for none.
        turn: Angle that is added in each step, observed as ``observation[1]``.
        reward: Reward of each step.
    """

    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, length=4, reached=(0,), turn=0.0, reward=1.0):
        super().__init__()
        self.length, self.reached, self.turn, self.reward = length, reached, turn, reward
        self.t, self.episode = 0, -1
        boxes = {"observation": 2, "achieved_goal": 1, "desired_goal": 3}
        self.observation_space = gym.spaces.Dict(
            {key: gym.spaces.Box(-np.inf, np.inf, (n,), np.float64) for key, n in boxes.items()}
        )

    def _result(self):
        obs = {
            "observation": np.array([self.t, self.turn * self.t]),
            "achieved_goal": np.array([10.0 + self.t]),
            "desired_goal": np.full(3, 100.0 + self.episode),
        }
        reached = self.reached[self.episode % len(self.reached)]
        return obs, {"success": 0 < self.t == reached}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.episode = 0, self.episode + 1
        return self._result()

    def step(self, action):
        self.t += 1
        obs, info = self._result()
        return obs, self.reward, False, self.t == self.length, info


def _wrap(env):
    env = GymWrapper(env)
    env.set_info_dict_reader(SuccessReader(batch_size=env.batch_size))
    return env


@pytest.fixture(params=["single", "serial", "inside a serial", "batched"])
def build(request):
    """Build one environment of ``Walk(**kwargs)`` for each of ``instances``, transformed.

    A single environment is the first instance only.
    """

    def build(make_transform, instances):
        makers = [lambda kwargs=kwargs: Walk(**kwargs) for kwargs in instances]
        if request.param == "single":
            return TransformedEnv(_wrap(makers[0]()), make_transform())
        if request.param == "serial":
            serial = SerialEnv(len(makers), [lambda make=make: _wrap(make()) for make in makers])
            return TransformedEnv(serial, make_transform())
        if request.param == "inside a serial":
            parts = [lambda m=m: TransformedEnv(_wrap(m()), make_transform()) for m in makers]
            return SerialEnv(len(makers), parts)
        vector = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.DISABLED)
        return TransformedEnv(_wrap(vector), make_transform())

    return build
