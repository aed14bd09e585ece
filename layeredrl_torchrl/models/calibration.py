"""Calibration of an ensemble's mixture on transitions that were not trained on."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["Calibration"]

# Standard deviations of the Gaussian prior on shift, slope, spread and log(disagreement). The prior
# keeps the calibration at the identity without data, and finite with little data; a few dozen rows
# outweigh it.
_PRIOR = (0.5, 0.25, 0.5, 1.0)


class Calibration(nn.Module):
    """Corrects the log std of ``M`` members, and how far their means lie apart.

    The log std becomes ``shift_d + slope_d * log_std + spread * o_m``. The std that a member learns
    is the error of its own weights on its training data, but predictions come from an average over
    weights and members, on other data. Shift and slope correct the std of each dimension. The
    members' offsets ``o`` run evenly from -1 to 1, so that the mixture has components of different
    widths: residuals of contact dynamics have heavier tails than one Gaussian.

    A member's mean becomes ``center + disagreement * (mean - center)``, where the center is the
    mean of the ensemble, which does not change. The error of the mean of ``M`` members is smaller
    than the members' differences (by ``M ** -0.5`` if their errors were independent), so the
    mixture of their own means is too flat in the middle. Fits to held-out data of MuJoCo tasks give
    a ``disagreement`` of 0.25 to 0.4 for 5 members.

    Args:
        n_models: ``M``.
        dim: ``D``.
    """

    disagreement: Tensor  # []
    shift: Tensor  # [D]
    slope: Tensor  # [D]
    spread: Tensor  # []
    offsets: Tensor  # [M]

    def __init__(self, n_models: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(dim))
        self.register_buffer("slope", torch.ones(dim))
        self.register_buffer("spread", torch.zeros(()))
        self.register_buffer("disagreement", torch.ones(()))
        offsets = torch.linspace(-1.0, 1.0, n_models) if n_models > 1 else torch.zeros(1)
        self.register_buffer("offsets", offsets)

    def reset_parameters(self) -> None:
        """Return to the state before the first :meth:`fit`."""
        for nothing in (self.shift, self.spread):
            nothing.zero_()
        for same in (self.slope, self.disagreement):
            same.fill_(1.0)

    def forward(self, std: Tensor) -> Tensor:
        """Correct ``std [M, ..., D]``, in the units of the normalised target."""
        shift, slope = self.affine()
        shift = shift.view(len(shift), *[1] * (std.ndim - 2), -1)
        return (shift + slope * std.log()).exp()

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return ``shift [M, D]`` and ``slope [D]`` of ``shift + slope * log_std``."""
        return self.shift + self.spread * self.offsets.unsqueeze(-1), self.slope

    def reconcile(self, mean: Tensor, weights: Tensor) -> Tensor:
        """Correct how far means ``[M, N, K, D]`` of the same rows lie apart.

        All modes of a member move together; ``weights [M, N, K]`` are theirs.
        """
        return mean + (self.disagreement - 1.0) * _from_average(mean, weights)

    @torch.no_grad()
    def fit(self, mean: Tensor, std: Tensor, weights: Tensor, target: Tensor) -> None:
        """Maximise the likelihood of held-out targets, with a prior around no correction.

        The likelihood is that of each dimension's marginal mixture over members and modes.

        Args:
            mean: Predicted means ``[M, N, K, D]``, uncorrected.
            std: Predicted std, uncorrected, ``[M, N, K, D]``.
            weights: ``[M, N, K]``.
            target: ``[N, D]``.
        """
        given, dim = (mean, std, weights, target), target.shape[-1]
        found = self._minimise(*given)
        if not bool(torch.isfinite(found).all()) and found.dtype != torch.float64:
            # With errors of many stds, the line search may leave the range of float32.
            on_host = (x.to("cpu", torch.float64) for x in given)  # some devices have no float64
            found = self._minimise(*on_host).to(found)
        if not bool(torch.isfinite(found).all()):
            raise ValueError(
                "the calibration did not converge to finite numbers; look at the held-out "
                "transitions for outliers"
            )
        shift, slope, spread, log_share = found.split((dim, dim, 1, 1))
        self.shift.copy_(shift)
        self.slope.copy_(slope)
        self.spread.copy_(spread.squeeze())
        self.disagreement.copy_(log_share.exp().squeeze())

    def _minimise(self, mean: Tensor, std: Tensor, weights: Tensor, target: Tensor) -> Tensor:
        """Return shift and slope ``[D]``, spread and log disagreement, concatenated.

        They are NaN where the search left the range of the inputs' dtype.
        """
        n_models, n, _, dim = mean.shape
        apart = _from_average(mean, weights)
        residual = target[None, :, None] - mean
        log_std = std.log()
        log_weights = weights.clamp_min(torch.finfo(weights.dtype).tiny).log().unsqueeze(-1)
        offsets = self.offsets.to(mean).view(-1, 1, 1, 1)
        start = (torch.zeros(dim), torch.ones(dim), torch.zeros(1), torch.zeros(1))
        parameters = torch.cat(start).to(mean)
        with torch.enable_grad():
            parameters.requires_grad_()
            optim = torch.optim.LBFGS(
                [parameters], max_iter=60, history_size=10, line_search_fn="strong_wolfe"
            )

            def objective() -> Tensor:
                optim.zero_grad()
                shift, slope, spread, log_share = parameters.split((dim, dim, 1, 1))
                scaled = shift + slope * log_std + spread * offsets
                square = (residual - (log_share.exp() - 1.0) * apart).square()
                log_prob = log_weights - scaled - 0.5 * square * (-2.0 * scaled).exp()
                nll = -log_prob.logsumexp((0, 2)).sum() + n * dim * math.log(n_models)
                prior = (
                    (shift / _PRIOR[0]).square().sum()
                    + ((slope - 1.0) / _PRIOR[1]).square().sum()
                    # All dimensions share these two, so their priors count once per dimension.
                    + dim * (spread / _PRIOR[2]).square().sum()
                    + dim * (log_share / _PRIOR[3]).square().sum()
                )
                loss = (nll + 0.5 * prior) / (n * dim)
                loss.backward()
                return loss

            try:
                optim.step(objective)
            except RuntimeError as error:  # a step beyond the range of its floats
                if "overflow" not in str(error):
                    raise
                return torch.full_like(parameters, math.nan)
        return parameters.detach()


def _from_average(mean: Tensor, weights: Tensor) -> Tensor:
    """Return each member's mean minus the mean of all members, ``[M, N, 1, D]``."""
    of_member = (weights.unsqueeze(-1) * mean).sum(-2)
    return (of_member - of_member.mean(0)).unsqueeze(-2)
