"""The likelihood of mixtures of Gaussians, weighted as in the dynamics loss."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["mixture_loss"]

_CONSTANT = 0.5 * math.log(2 * math.pi)
# A mode with less than exp(-60) of the highest likelihood does not change the sum, but its gradient
# would hold subnormal numbers, which processors multiply ten times more slowly.
_UNLIKELY = -60.0
# From this share of a dimension's variance on, the dimension counts as not explained at all.
_UNEXPLAINED = 0.1


def mixture_loss(
    mixture: tuple[Tensor, Tensor, Tensor],
    target: Tensor,
    weight: Tensor,
    *,
    of_means: float,
    of_stds: Tensor | float,
    limit: float,
) -> tuple[Tensor, Tensor]:
    """Return the loss of each member and its negative log-likelihood in nats, ``[M]`` each.

    With ``beta = 0`` both are the same; see :class:`~layeredrl_torchrl.ModelLoss` for other values.

    Once the beta of the stds is below that of the means, the beta of the means falls in each
    dimension with the unexplained share of its variance, as far as this is below a tenth. So rare
    changes are still learned, and explained dimensions become precise.

    Args:
        mixture: Mean and std ``[M, N, K, D]``, log weights ``[M, N, K]``.
        target: In units of its std in the data, ``[M, N, 1, D]``.
        weight: Shares of the rows, ``[M, N]``.
        of_means: Beta in the gradient of the means, where they explain little.
        of_stds: Beta in all other gradients, ``[]``.
        limit: Number of stds beyond which errors count linearly.
    """
    mean, std, log_weights = mixture
    changes = isinstance(of_stds, Tensor)
    log_std, error = std.detach().log(), (mean - target).detach()
    share = pull = None
    if changes or of_stds:
        share = _relative(log_std, of_stds, weight)
    if changes or of_means != of_stds:
        left = _unexplained(error, log_weights.detach(), weight)
        if isinstance(of_stds, Tensor):
            left = torch.where(of_stds < torch.full_like(of_stds, of_means), left, 1.0)
        pull = _relative(log_std, of_means * left, weight)
        if share is not None:
            pull.div_(share)
    surprise, _, _ = _Surprise.apply(mean, std, target, log_std, error, limit, pull)
    joint = log_weights - (surprise if share is None else surprise.detach()).sum(-1)  # [M, N, K]
    log_prob = _log_sum_exp(joint)  # [M, N, 1]
    nll = -((log_prob.squeeze(-1) - _CONSTANT * surprise.shape[-1]) * weight).sum(-1)
    if share is None:
        return nll, nll
    log_r = (joint - log_prob).detach()
    row = (share * surprise).sum(-1)
    return _of_modes(row + _CONSTANT * surprise.shape[-1], log_weights, log_r, weight), nll


class _Surprise(torch.autograd.Function):
    """Negative log-density of each dimension under each mode, without its constant.

    ``log std + huber(z)`` with ``z = (mean - target) / std``. It handles the largest tensors of an
    update, so its derivatives are written out: autograd needs three times as many operations.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        mean: Tensor,
        std: Tensor,
        target: Tensor,
        log_std: Tensor,
        error: Tensor,
        limit: float,
        pull: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the value, and for the derivatives ``z`` and the clamped ``z``.

        ``log_std`` and ``error`` (mean minus target) get no gradient of their own. The gradient of
        the mean is multiplied by ``pull``.
        """
        # In place where possible: allocating memory costs as much as the operations.
        z = error / std
        near = z.clamp(-limit, limit)
        return torch.add(z, near, alpha=-0.5).mul_(near).add_(log_std), z, near

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save the tensors that the derivatives need."""
        _, std, target, _, _, _, pull = inputs
        _, z, near = output
        ctx.mark_non_differentiable(z, near)
        ctx.save_for_backward(std, z, near, pull)
        ctx.target_shape = target.shape

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Compute the derivatives; the derivative by ``z`` is the clamped ``z``."""
        std, z, near, pull = ctx.saved_tensors
        of_z = grad * near
        of_std = torch.addcmul(grad, of_z, z, value=-1.0).div_(std)
        of_mean = of_z.div_(std)
        if pull is not None:
            of_mean.mul_(pull)
        of_target = -of_mean.sum_to_size(ctx.target_shape) if ctx.needs_input_grad[2] else None
        return of_mean, of_std, of_target, None, None, None, None


def _unexplained(error: Tensor, log_weights: Tensor, weight: Tensor) -> Tensor:
    """Return mean squared errors over ``_UNEXPLAINED``, at most 1, ``[M, 1, 1, D]``.

    Args:
        error: In units of the target's std, without gradient, ``[M, N, K, D]``.
        log_weights: Of the modes, ``[M, N, K]``.
        weight: Shares of the rows, ``[M, N]``.
    """
    shares = (weight.unsqueeze(-1) * log_weights.exp()).flatten(1).unsqueeze(1)
    share = torch.bmm(shares.to(error.dtype), error.square().flatten(1, 2))  # [M, 1, D]
    return share.div_(_UNEXPLAINED).clamp_(max=1.0).unsqueeze(1)


def _relative(log_std: Tensor, beta: Tensor | float, weight: Tensor) -> Tensor:
    """Return ``std ** (2 beta) [M, N, K, D]``, divided by its mean over rows and modes.

    Args:
        log_std: ``[M, N, K, D]``, without gradient.
        beta: ``[]``, or ``[M, 1, 1, D]``.
        weight: Shares of the rows, ``[M, N]``.
    """
    n_modes = log_std.shape[-2]
    v = torch.mul(log_std, 2.0 * beta).exp_()
    shares = weight.to(v.dtype).repeat_interleave(n_modes, -1).unsqueeze(1) / n_modes
    mean = torch.bmm(shares, v.flatten(1, 2)).unsqueeze(1)  # [M, 1, 1, D]
    # The mean is 0 for a member without rows; its shares have to stay finite.
    return v.mul_(mean.clamp_min(torch.finfo(v.dtype).tiny ** 0.75).reciprocal_())


def _of_modes(row: Tensor, log_weights: Tensor, log_r: Tensor, weight: Tensor) -> Tensor:
    """Return the mean over rows, ``[M]``, of the modes' weighted negative log-likelihoods.

    A row contributes ``sum_k r_k (log r_k - log w_k + row_k)``, with responsibilities ``r``.
    Unweighted, this is its negative log-likelihood, in value and in gradient.

    Args:
        row: ``[M, N, K]``.
        log_weights: ``log w [M, N, K]``.
        log_r: ``log r [M, N, K]``, without gradient.
        weight: Shares of the rows, ``[M, N]``.
    """
    if row.shape[-1] == 1:
        return (row.squeeze(-1) * weight).sum(-1)
    r = log_r.exp().masked_fill(log_r < _UNLIKELY, 0.0)
    return ((r * (log_r - log_weights + row)).sum(-1) * weight).sum(-1)


def _log_sum_exp(joint: Tensor) -> Tensor:
    """Return the log-density of a mixture, ``[M, N, 1]``, from those of its modes."""
    if joint.shape[-1] == 1:
        return joint
    joint = joint.clamp_min(joint.detach().amax(-1, keepdim=True) + _UNLIKELY)
    return joint.logsumexp(-1, keepdim=True)


# torch binds the arguments of each call by the signature, and would inspect it each time.
_Surprise.forward.__signature__ = inspect.signature(_Surprise.forward)  # type: ignore[attr-defined]
