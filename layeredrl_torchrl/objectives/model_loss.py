"""The loss of a probabilistic ensemble."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives import LossModule

from layeredrl_torchrl.models import ProbabilisticEnsemble

__all__ = ["ModelLoss"]

_LOG_2PI = math.log(2 * math.pi)


class ModelLoss(LossModule):
    """Negative log-likelihood of next states and of terminations, summed over members.

    For each member the first is the mean over transitions of ``-log p(target)``, in nats, in the
    normalised units of :meth:`~layeredrl_torchrl.ProbabilisticEnsemble.target` (arXiv 1805.12114,
    equation 1, with a mixture and with its constants kept); the second is a binary cross
    entropy. Every member counts once, and transitions that are not ``valid`` not at all.

    Args:
        model: The ensemble.
        per_member: Whether batches come with a leading member axis, ``[M, N]``, so that each
            member learns from transitions of its own; else all learn from the same ``[N]``.

    Reads (``set_keys`` renames): ``state``, ``context``, ``action``, ``next_state``
    (``("next", "state")``), ``terminated`` (``("next", "terminated")``), and where present
    ``valid`` (bool ``[N]`` or ``[N, 1]``) and ``weight`` (float, same shape).

    Writes ``loss_dynamics`` and ``loss_termination`` (sums over members), and for the log
    ``nll`` (nats per dimension, averaged over members) and ``termination_bce``.

    Raises:
        KeyError: A missing entry. ValueError: no valid transition in the batch.
    """

    @dataclass
    class _AcceptedKeys:
        """Names of the entries read; see :class:`ModelLoss`."""

        state: NestedKey = "state"
        context: NestedKey = "context"
        action: NestedKey = "action"
        next_state: NestedKey = ("next", "state")
        terminated: NestedKey = ("next", "terminated")
        valid: NestedKey = "valid"
        weight: NestedKey = "weight"

    default_keys = _AcceptedKeys
    out_keys = ["loss_dynamics", "loss_termination", "nll", "termination_bce"]

    def __init__(self, model: ProbabilisticEnsemble, *, per_member: bool = False) -> None:
        super().__init__()
        self.model = model
        self.per_member = per_member

    @property
    def functional(self) -> bool:
        """The model is used as it is, with its own parameters."""
        return False

    @property
    def in_keys(self) -> list[NestedKey]:
        """The entries that must be present."""
        keys = self.tensor_keys
        return [keys.state, keys.context, keys.action, keys.next_state, keys.terminated]

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Compute the losses of a batch ``[N]``, or ``[M, N]`` with ``per_member``."""
        expected = 2 if self.per_member else 1
        if tensordict.ndim != expected or (
            self.per_member and tensordict.shape[0] != self.model.n_models
        ):
            shape = f"[{self.model.n_models}, N]" if self.per_member else "[N]"
            raise ValueError(
                f"ModelLoss(per_member={self.per_member}) takes a batch of shape {shape}, got "
                f"{tuple(tensordict.shape)}"
            )
        values = []
        for key in self.in_keys:
            value = tensordict.get(key, None)
            if value is None:
                raise KeyError(
                    f"ModelLoss reads {key!r}, which is missing; the batch has "
                    f"{sorted(map(str, tensordict.keys(True, True)))}. Rename it with set_keys()"
                )
            if not self.per_member:
                value = value.expand(self.model.n_models, *value.shape)
            values.append(value)
        state, context, action, next_state, terminated = values
        weight, masked = self._weights(tensordict, state)
        if masked:
            # What does not count may be anything, NaN too, which a weight of 0 would not stop.
            keep = (weight > 0).unsqueeze(-1)
            state, context, next_state = (
                torch.where(keep, x, 0.0) for x in (state, context, next_state)
            )
            if action.is_floating_point():
                action = torch.where(keep, action, 0.0)

        (mean, std), weights, term_prob = self.model.predict_normalized(state, context, action)
        target = self.model.target(state, next_state).unsqueeze(-2)
        # [M, N, K]: log-density of each mode
        log_prob = -0.5 * (((target - mean) / std).square() + _LOG_2PI) - std.log()
        log_prob = log_prob.sum(-1)
        if self.model.n_modes > 1:
            log_weights = weights.clamp_min(torch.finfo(weights.dtype).tiny).log()
            log_prob = (log_prob + log_weights).logsumexp(-1, keepdim=True)
        nll = -(log_prob.squeeze(-1) * weight).sum(-1)  # [M]
        bce = F.binary_cross_entropy(
            term_prob, terminated.squeeze(-1).to(term_prob.dtype), reduction="none"
        )
        bce = (bce * weight).sum(-1)  # [M]
        return TensorDict(
            {
                "loss_dynamics": nll.sum(),
                "loss_termination": bce.sum(),
                "nll": nll.detach().mean() / self.model.state_dim,
                "termination_bce": bce.detach().mean(),
            }
        )

    def _weights(self, tensordict: TensorDictBase, state: Tensor) -> tuple[Tensor, bool]:
        """The share of each transition in its member's mean, ``[M, N]``, and whether any is less.

        Rows sum to 1, but for members of which no transition counts.
        """
        weight = state.new_ones(state.shape[:-1])
        masked = False
        for key in (self.tensor_keys.valid, self.tensor_keys.weight):
            value = tensordict.get(key, None)
            if value is not None:
                if value.ndim > tensordict.ndim:
                    value = value.squeeze(-1)
                weight = weight * value.to(weight.dtype)
                masked = True
        total = weight.sum(-1, keepdim=True)
        if not bool((total > 0).any()):
            raise ValueError(
                f"no transition of the batch counts: {self.tensor_keys.valid!r} and "
                f"{self.tensor_keys.weight!r} leave nothing; check the mask"
            )
        return weight / total.clamp_min(torch.finfo(weight.dtype).tiny), masked
