"""The loss of a probabilistic ensemble."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from layeredrl_torchrl._checks import (
    check_finite,
    check_flag,
    check_instance,
    check_number,
    check_resolution,
    check_width,
    require,
)
from layeredrl_torchrl._padding import masks_of
from layeredrl_torchrl._precision import full_precision
from layeredrl_torchrl._watch import refuse, watched
from layeredrl_torchrl.models import ProbabilisticEnsemble
from layeredrl_torchrl.objectives._likelihood import mixture_loss
from layeredrl_torchrl.objectives.terms import TermsLoss
from layeredrl_torchrl.specs import canonical_action, is_discrete, width

__all__ = ["ModelInputs", "ModelLoss"]


class ModelInputs(NamedTuple):
    """A checked batch of :class:`ModelLoss`, without NaN in rows that do not count."""

    state: Tensor  # [M, N, D]
    context: Tensor  # [M, N, C]
    action: Tensor  # [M, N, A], or discrete in the form of the spec
    next_state: Tensor  # [M, N, D]
    terminated: Tensor  # [M, N], bool or float
    weight: Tensor  # [M, N]: how much each transition counts
    beta: Tensor | float | None = None  # []: for the stds, replaces the beta of the loss

    def split(self, size: int) -> list[ModelInputs]:
        """Split into batches of ``size`` transitions for each member."""
        parts = zip(*(x.split(size, 1) for x in self[:6]), strict=True)
        return [ModelInputs(*part)._replace(beta=self.beta) for part in parts]


class ModelLoss(TermsLoss):
    """Negative log-likelihood of next states and terminations, summed over members.

    For each member, the dynamics loss is the mean over transitions of ``-log p(target)``, in nats,
    in the normalised units of :meth:`~layeredrl_torchrl.ProbabilisticEnsemble.target` (arXiv
    1805.12114, equation 1, for a mixture and with its constants). The termination loss is a binary
    cross entropy. All members count equally, and transitions that are not ``valid`` do not count.

    >>> spaces = Unbounded((3,)), None, Bounded(-1.0, 1.0, (1,))
    >>> model = ProbabilisticEnsemble(*spaces, n_models=2)
    >>> batch = TensorDict({"state": torch.zeros(7, 3), "action": torch.zeros(7, 1)}, [7])
    >>> batch["context"] = batch["state"][:, :0]
    >>> batch["next"] = {"state": torch.ones(7, 3), "terminated": torch.zeros(7, 1)}
    >>> sorted(ModelLoss(model)(batch).keys())
    ['loss_dynamics', 'loss_termination', 'nll', 'termination_bce']

    Args:
        model: The ensemble.
        per_member: Whether batches have a leading member axis, ``[M, N]``, so that each member
            learns from its own transitions; otherwise all learn from the same ``[N]``.
        beta: In [0, 1]. In each dimension, the gradient of a row is multiplied by
            ``std ** (2 * beta)`` of its predicted std: beta-NLL (arXiv 2203.09168, section 3). The
            plain likelihood (0) favours rows that are already predicted well, squared errors (1)
            those that are predicted badly. In each dimension, the factors are divided by their mean
            over the batch: otherwise a dimension that is predicted to a thousandth of its spread
            would hardly count against the others and against termination. With several modes, each
            is weighted by its own std, with the responsibilities of the unweighted likelihood (the
            gradient of a mixture's likelihood is that of its modes' log-densities, averaged with
            these).
        huber_std: Errors beyond this many predicted stds count linearly instead of squared (Huber,
            1964), so that single unpredictable readings (an impact, a broken sensor) do not
            dominate the gradient. Normal errors stay below it; ``None`` is the plain likelihood.

    Reads (``set_keys`` renames): ``state``, ``context``, ``action``, ``next_state``
    (``("next", "state")``), ``terminated`` (``("next", "terminated")``), and where present
    ``valid`` (bool ``[N]`` or ``[N, 1]``), ``weight`` (float, same shape), and the masks named by
    TorchRL's ``loss_mask_key`` (by default ``("collector", "mask")``, which is false for padding).

    Writes ``loss_dynamics`` and ``loss_termination`` (sums over members), and for logging ``nll``
    (nats per dimension, averaged over members, for any ``beta``) and ``termination_bce``.

    Raises:
        KeyError: A missing entry. TypeError: Integers where floats are expected. ValueError: Other
            shapes; values so far from 0 that the model's dtype would round off their changes; no
            valid transition in the batch; ``beta`` or ``huber_std`` outside its range.
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

    def __init__(
        self,
        model: ProbabilisticEnsemble,
        *,
        per_member: bool = False,
        beta: float = 0.0,
        huber_std: float | None = 10.0,
    ) -> None:
        super().__init__()
        check_instance("model", model, ProbabilisticEnsemble, hint="give the ensemble to train")
        self.beta = check_number("beta", beta, 0.0, 1.0)
        if huber_std is not None:
            check_number("huber_std", huber_std, 0.0, open_low=True)
        self.huber_std = huber_std
        self.model = model
        self.per_member = check_flag("per_member", per_member)

    @property
    def in_keys(self) -> list[NestedKey]:
        """The entries that must be present."""
        keys = self.tensor_keys
        return [keys.state, keys.context, keys.action, keys.next_state, keys.terminated]

    @watched
    def prepare(self, tensordict: TensorDictBase) -> ModelInputs:
        """Check and mask a batch ``[N]``, or ``[M, N]`` with ``per_member``.

        Several batches may be joined; :meth:`ModelInputs.split` separates them again.

        Raises:
            KeyError, ValueError: See the class.
        """
        expected = 2 if self.per_member else 1
        if tensordict.ndim != expected or (
            self.per_member and tensordict.shape[0] != self.model.n_models
        ):
            shape = f"[{self.model.n_models}, N]" if self.per_member else "[N]"
            raise ValueError(
                f"ModelLoss(per_member={self.per_member}) takes a batch of shape {shape}, got "
                f"{tuple(tensordict.shape)}"
            )
        keys, model = self.tensor_keys, self.model
        state, context, next_state = (
            self._rows(tensordict, key, width_of)
            for key, width_of in (
                (keys.state, model.state_dim),
                (keys.context, model.context_dim),
                (keys.next_state, model.state_dim),
            )
        )
        terminated = self._terminated(tensordict)
        weight, masked = self._weights(tensordict, state)
        action = self._of_members(tensordict, keys.action)
        if masked:
            # Rows that do not count may hold NaN, which a weight of 0 would not remove.
            keep = (weight > 0).unsqueeze(-1)
            state, context, next_state = (
                torch.where(keep, x, 0.0) for x in (state, context, next_state)
            )
            # Zeros are no choice, and may be outside of bounds. A member may have no row at all.
            most = weight.flatten().argmax(0, keepdim=True)
            one = action[most // weight.shape[1], most % weight.shape[1]]
            keep = (weight > 0).reshape(weight.shape + (1,) * (action.ndim - 2))
            action = torch.where(keep, action, one)
            terminated = torch.where(weight > 0, terminated, torch.zeros_like(terminated))
        action = self._canonical(action)
        hint = "repair the data, or leave such transitions out by `valid`"
        named = {"state": state, "context": context, "next_state": next_state}
        if action.is_floating_point():
            named["action"] = action
        for name, value in named.items():
            check_finite(f"ModelLoss: {name}", value, hint=hint)
        if terminated.dtype != torch.bool:
            refuse(
                ~((terminated >= 0) & (terminated <= 1)).all(),
                lambda _: ValueError(
                    f"ModelLoss: {self.tensor_keys.terminated!r} must lie in [0, 1]; {hint}"
                ),
            )
        return ModelInputs(state, context, action, next_state, terminated, weight)

    def _rows(self, tensordict: TensorDictBase, key: NestedKey, n: int) -> Tensor:
        """Return an entry as floats ``[M, N, n]``."""
        return self._floats(key, self._of_members(tensordict, key), n)

    def _canonical(self, action: Tensor) -> Tensor:
        """Bring actions ``[M, N, ...]`` into the form of the spec."""
        key, spec = self.tensor_keys.action, self.model.action_spec
        if is_discrete(spec):
            return canonical_action(spec, action, action.shape[:2])
        return self._floats(key, action, width(spec))

    def _floats(self, key: NestedKey, value: Tensor, n: int) -> Tensor:
        """Check ``value [M, N, n]``, and bring it to the dtype that the model computes in."""
        name = f"ModelLoss: {key!r}"
        check_width(name, value, n, hint="the model was built for this width")
        if value.ndim != 3:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} with the members' axis, expected "
                f"[M, N, {n}]"
            )
        check_resolution(name, value, self.model.floats.dtype)
        return value.to(self.model.floats.dtype)

    def _terminated(self, tensordict: TensorDictBase) -> Tensor:
        """Return ``[M, N]``."""
        key, batch = self.tensor_keys.terminated, (self.model.n_models, tensordict.shape[-1])
        value = self._of_members(tensordict, key)
        if tuple(value.shape) not in (batch, (*batch, 1)):
            raise ValueError(
                f"ModelLoss: {key!r} has shape {tuple(value.shape)} with the members' axis, "
                f"expected {(*batch, 1)}"
            )
        return value.reshape(batch)

    def _of_members(self, tensordict: TensorDictBase, key: NestedKey) -> Tensor:
        """Return the entry ``[M, N, ...]``."""
        value = require(tensordict, key, reader="ModelLoss", hint="rename it with set_keys()")
        return value if self.per_member else value.expand(self.model.n_models, *value.shape)

    def terms(self, prepared: ModelInputs) -> dict[str, Tensor]:
        """Compute the losses of a prepared batch, as :meth:`forward` writes them."""
        state, context, action, next_state, terminated, weight, beta = prepared
        # Shares in the member's mean; all 0 for a member without transitions that count.
        weight = weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
        (mean, std), weights, term_prob = self.model.predict_normalized(state, context, action)
        target = self.model.target(state, next_state).unsqueeze(-2)
        log_weights = torch.zeros_like(weights)
        if self.model.n_modes > 1:
            log_weights = weights.clamp_min(torch.finfo(weights.dtype).tiny).log()
        dynamics, nll = mixture_loss(
            (mean, std, log_weights),
            target,
            weight,
            of_means=self.beta,
            of_stds=self.beta if beta is None else beta,
            limit=math.inf if self.huber_std is None else self.huber_std,
        )
        bce = (_termination_bce(term_prob, terminated) * weight).sum(-1)  # [M]
        return {
            "loss_dynamics": dynamics.sum(),
            "loss_termination": bce.sum(),
            "nll": nll.detach().mean() / self.model.state_dim,
            "termination_bce": bce.detach().mean(),
        }

    def _weights(self, tensordict: TensorDictBase, state: Tensor) -> tuple[Tensor, bool]:
        """Return the weight of each transition, ``[M, N]``, and whether some may be 0."""
        weight, keys = state.new_ones(state.shape[:-1]), self.tensor_keys
        found = masks_of(tensordict, (keys.valid, keys.weight, *self._loss_mask_keys()))
        for value in found.values():
            if value.ndim > tensordict.ndim:
                value = value.squeeze(-1)
            weight = weight * value.to(weight.dtype)
        if found:
            refuse(
                ~((weight >= 0) & weight.isfinite()).all(),
                lambda _: ValueError(
                    f"{keys.weight!r} must be finite and at least 0; a negative weight would teach "
                    "the opposite"
                ),
            )
            refuse(
                ~(weight > 0).any(),
                lambda _: ValueError(
                    f"no transition of the batch counts: {keys.valid!r} and {keys.weight!r} leave "
                    "nothing; check the mask"
                ),
            )
        return weight, bool(found)


def _termination_bce(prob: Tensor, terminated: Tensor) -> Tensor:
    """Return the binary cross entropy ``[M, N]``, NaN where ``prob`` is NaN.

    Torch's own raises for values outside [0, 1]; on a GPU that ends the process.
    """
    ended = terminated.to(prob.dtype)
    if terminated.dtype != torch.bool:
        ended = ended.nan_to_num(0.0).clamp(0.0, 1.0)  # prepare() refused other values
    known = ~prob.isnan()
    with full_precision(prob.device):  # autocast refuses this function on a GPU
        bce = F.binary_cross_entropy(torch.where(known, prob, 0.5), ended, reduction="none")
    return torch.where(known, bce, prob)
