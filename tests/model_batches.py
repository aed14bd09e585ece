"""Batches of transitions for an ensemble's loss, and a network for it."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import nn

from layeredrl_torchrl import ModelLoss

N, D = 7, 2


def make_batch(model, shape=(N,), valid=False, weight=False):
    action = model.action_spec.rand(shape)
    data = {
        "state": torch.randn(*shape, D) + 1.0,
        "context": torch.randn(*shape, model.context_dim),
        "action": action,
        "next": {
            "state": 2.0 * torch.randn(*shape, D),
            "terminated": torch.rand(*shape, 1) < 0.4,
        },
    }
    if valid:
        data["valid"] = torch.rand(shape) < 0.6
        data["valid"][..., 0] = True
    if weight:
        data["weight"] = 3.0 * torch.rand(shape)
    return TensorDict(data, shape)


def fit(model):
    """Give the model statistics that are neither 0 nor 1."""
    n = 50
    state, next_state = 3 * torch.randn(n, D) + 1, 0.5 * torch.randn(n, D) - 2
    model.fit_statistics(
        state, torch.randn(n, model.context_dim), model.action_spec.rand((n,)), next_state
    )
    return model


def gradients(model, batch, beta=0.0):
    model.zero_grad()
    out = ModelLoss(model, beta=beta)(batch)
    (out["loss_dynamics"] + out["loss_termination"]).backward()
    return out.detach().to_dict(), [p.grad.clone() for p in model.members.parameters()]


class Constant(nn.Module):
    """A member that predicts one Gaussian and one termination probability for all inputs."""

    def __init__(self, mean, std, term_prob):
        super().__init__()
        self.mean, self.std = nn.Parameter(mean.clone()), nn.Parameter(std.clone())
        self.term_prob = nn.Parameter(torch.as_tensor(term_prob))

    def forward(self, state, context, action):
        ones = torch.ones_like(state[..., 0])
        shape = (*ones.shape, 1, D)
        return (
            (self.mean.expand(shape), self.std.expand(shape)),
            ones.unsqueeze(-1),
            (self.term_prob * ones),
        )
