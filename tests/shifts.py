"""A hand-written ensemble whose states tell which member moved them."""

from __future__ import annotations

import torch
from torchrl.data import Bounded, Unbounded

from layeredrl_torchrl import Model


class Shifts(Model):
    """Member m adds 10 ** m, so that a state's digits count which members moved it.

    The probability of termination is m / 10, unless another number is given for all.
    """

    def __init__(self, n_models, term_prob=None, **options):
        spaces = Unbounded((1,)), Unbounded((1,)), Bounded(-1.0, 1.0, (1,))
        super().__init__(*spaces, n_models=n_models, **options)
        self.term_prob = term_prob
        self.rows = []  # how many rows each member was evaluated on, at every step

    def predict_members(self, state, context, action):
        assert state.shape[:2] == context.shape[:2] == action.shape[:2]
        self.rows.append(state.shape[1])
        member = torch.arange(self.n_models, dtype=state.dtype)
        mean = (state + (10.0**member).view(-1, 1, 1)).unsqueeze(-2)
        term_prob = (member / 10.0).unsqueeze(-1).expand(state.shape[:2])
        if self.term_prob is not None:
            term_prob = torch.full_like(term_prob, self.term_prob)
        return (mean, torch.zeros_like(mean)), torch.ones_like(mean[..., 0]), term_prob


def digits(states, n_models):
    """How often each member moved a particle, ``[..., M]``."""
    value = states.squeeze(-1).round().long()
    return torch.stack([(value // 10**m) % 10 for m in range(n_models)], -1)
