"""Reading success from what gymnasium's environments report."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tensordict import TensorDict
from torchrl.envs import GymWrapper
from torchrl.envs.utils import check_env_specs

from layeredrl_torchrl.envs import SuccessReader


class Reporter(gym.Env):
    """Succeeds at its ``at``-th step; its ``info`` says so as ``key: kind(...)``."""

    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, at=2, kind=bool, key="success", at_reset=True):
        self.at, self.kind, self.key, self.at_reset, self.t = at, kind, key, at_reset, 0

    def info(self):
        return {self.key: self.kind(self.t == self.at)} if self.key else {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), self.info() if self.at_reset else {}

    def step(self, action):
        self.t += 1
        return np.zeros(1, np.float32), 0.0, self.t == 4, False, self.info()


def wrap(env, **kwargs):
    env = GymWrapper(env)
    env.set_info_dict_reader(SuccessReader(batch_size=env.batch_size, **kwargs))
    return env


@pytest.mark.parametrize("at_reset", [True, False])
@pytest.mark.parametrize("kind", [bool, np.bool_, float, np.float32, int])
def test_success_of_any_kind_is_read_from_a_single_environment(kind, at_reset):
    env = wrap(Reporter(kind=kind, at_reset=at_reset))
    check_env_specs(env)
    data = env.rollout(4)
    assert data["next", "success"].dtype == torch.bool
    assert data["next", "success"].tolist() == [[False], [True], [False], [False]]
    assert data["success"].tolist() == [[False], [False], [True], [False]]


def test_success_at_a_reset_is_reported():
    assert wrap(Reporter(at=0)).reset()["success"].tolist() == [True]


@pytest.mark.parametrize("at_reset", [True, False])
@pytest.mark.parametrize("kind", [bool, float])
def test_success_is_read_from_each_of_several_environments_through_partial_resets(kind, at_reset):
    makers = [lambda at=at: Reporter(at, kind, at_reset=at_reset) for at in (1, 3)]
    env = wrap(SyncVectorEnv(makers, autoreset_mode=AutoresetMode.DISABLED))
    check_env_specs(env)
    data = env.rollout(8, break_when_any_done=False)["next", "success"].squeeze(-1)
    assert data.tolist() == [[t % 4 == 0 for t in range(8)], [t % 4 == 2 for t in range(8)]]
    env.reset()
    td = env.rand_step()["next"].exclude("reward")
    assert td["success"].tolist() == [[True], [False]]
    mask = torch.tensor([[False], [True]])
    assert env.reset(TensorDict({**td, "_reset": mask}, [2]))["success"].tolist() == [
        [True],
        [False],
    ]


def test_keys_can_be_renamed():
    env = wrap(Reporter(key="is_success"), key="is_success", out_key="solved")
    assert env.rollout(4)["next", "solved"].flatten().tolist() == [False, True, False, False]


def test_an_info_without_it_is_an_error_after_a_step_only():
    makers = [Reporter, lambda: Reporter(key="")]  # one of many
    several = wrap(SyncVectorEnv(makers, autoreset_mode=AutoresetMode.DISABLED))
    for env, held in ((wrap(Reporter(key="is_success")), r"\['is_success'\]"), (several, "")):
        assert not env.reset()["success"].any()
        with pytest.raises(KeyError, match=f"no 'success' after a step, it holds {held}"):
            env.rand_step()


@pytest.mark.parametrize("kind", [lambda x: 0.5, lambda x: float("nan")])
def test_what_is_neither_true_nor_false_is_an_error(kind):
    with pytest.raises(ValueError, match="expected true or false"):
        wrap(Reporter(kind=kind)).reset()
