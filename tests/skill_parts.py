"""Levels of skills over a predictor whose changes are linear in the skill."""

from __future__ import annotations

import torch
from helpers import SMALL_SAC, make_predictor
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded

from layeredrl_torchrl import SkillLevel

BOX = Bounded(-1.0, 1.0, (2,))


class LinearNet(nn.Module):
    """A member that knows: the state changes by ``gain * z``, whatever it is."""

    def __init__(self, state_space, context_space, action_space, n_modes, gain=(0.7, 0.3)):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, state, context, action):
        mean = (action[..., :2] * self.gain).unsqueeze(-2)
        term_prob = torch.zeros(state.shape[:-1])
        return (mean, torch.ones_like(mean)), term_prob.unsqueeze(-1) + 1.0, term_prob


def make_linear(**options):
    """A predictor whose change of the state ``[2]`` is linear in the skill, exactly."""
    known = {"normalize_targets": False, "normalize_inputs": False, "ema_decay": None}
    model = {"action_space": 2, "partial_net": LinearNet, "n_models": 1, **known}
    return make_predictor(model=model | options)


def make_skills(reward, predictor=None, input_spec=BOX, **options):
    """A level for a reward, attached to a predictor if there is one."""
    given = {"input_spec": input_spec, "duration": 3, "learner_factory": SMALL_SAC}
    level = SkillLevel(skill_reward=reward, **given | options)
    if predictor is not None:
        level.attach(predictor)
    return level


def transitions(n=12, obs=2, skill_dim=2):
    """Transitions of skills of three steps each, as a hierarchy lays them out."""
    step = torch.arange(n).remainder(3).unsqueeze(-1)
    skill = torch.rand(n, skill_dim).mul(2).sub(1)
    following = {
        "parent_observation": torch.randn(n, obs),
        "reward": torch.full((n, 1), 7.0),
        "input_done": step == 2,
    }
    following["observation"] = following["parent_observation"]
    now = {"parent_observation": torch.randn(n, obs), "input": skill, "n_actions": step}
    return TensorDict({**now, "next": following}, [n])


def interval(change, gain, std):
    """``log`` of the mean over uniform z in [-1, 1] of a Gaussian around ``gain * z``."""
    normal = torch.distributions.Normal(0.0, 1.0)
    upper, lower = (change + gain) / std, (change - gain) / std
    return ((normal.cdf(upper) - normal.cdf(lower)) / (2 * gain)).log()
