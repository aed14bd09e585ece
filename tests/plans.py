"""First moves of planners, and a world in which a plan is a gamble."""

from __future__ import annotations

import torch
from helpers import known, observed
from torchrl.data import Bounded


def first(kind, predictor, obs, **options):
    planner = kind(predictor, **{"horizon": 3, "n_samples": 200} | options)
    return planner(observed(planner, obs))["action"]


def gamble(reward=lambda s, c, a: s[..., 0], spoil=lambda after, action: after, n_models=2):
    """Two members: what the one gains from a positive action, the other loses, less a bit."""
    factor = torch.linspace(1.0, -0.7, n_models).view(-1, 1, 1)

    def after(state, action):
        return spoil(state + factor * action.clamp_min(0.0), action)

    return known(after, reward, Bounded(-1.0, 1.0, (1,)), n_models=n_models)
