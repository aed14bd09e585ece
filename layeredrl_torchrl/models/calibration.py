"""Calibration of predicted standard deviations on transitions that were not trained on."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["StdCalibration"]

# Standard deviations of the Gaussian prior on shift, slope and spread: it keeps the calibration
# at the identity without data and finite with little; a few dozen rows outweigh it.
_PRIOR = (0.5, 0.25, 0.5)


class StdCalibration(nn.Module):
    """Corrects the log std of ``M`` members: ``shift_d + slope_d * log_std + spread * o_m``.

    What a member learns as its std is the error of its own weights on the data it is trained on;
    what is predicted with is an average over weights and over members, on other data. Shift and
    slope correct the size for each dimension. The members' offsets ``o`` run evenly from -1 to 1,
    so that the mixture has components of different widths: residuals of contact dynamics have
    heavier tails than one Gaussian.

    Args:
        n_models: ``M``.
        dim: ``D``.
    """

    shift: Tensor  # [D]
    slope: Tensor  # [D]
    spread: Tensor  # []
    offsets: Tensor  # [M]

    def __init__(self, n_models: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(dim))
        self.register_buffer("slope", torch.ones(dim))
        self.register_buffer("spread", torch.zeros(()))
        offsets = torch.linspace(-1.0, 1.0, n_models) if n_models > 1 else torch.zeros(1)
        self.register_buffer("offsets", offsets)

    def forward(self, std: Tensor) -> Tensor:
        """Correct ``std [M, ..., D]``, in the units of the normalised target."""
        offsets = self.offsets.view(-1, *[1] * (std.ndim - 1))
        return std.pow(self.slope) * (self.shift + self.spread * offsets).exp()

    @torch.no_grad()
    def fit(self, mean: Tensor, std: Tensor, weights: Tensor, target: Tensor) -> None:
        """Maximise the likelihood of held-out targets, with a prior that the std is right.

        The likelihood is that of each dimension's marginal mixture over members and modes.

        Args:
            mean: Predicted means ``[M, N, K, D]``.
            std: Predicted std, uncorrected, ``[M, N, K, D]``.
            weights: ``[M, N, K]``.
            target: ``[N, D]``.
        """
        n_models, n, _, dim = mean.shape
        square = (target[None, :, None] - mean).square()
        log_std = std.log()
        log_weights = weights.clamp_min(torch.finfo(weights.dtype).tiny).log().unsqueeze(-1)
        offsets = self.offsets.view(-1, 1, 1, 1)
        parameters = torch.cat((torch.zeros(dim), torch.ones(dim), torch.zeros(1))).to(mean)
        with torch.enable_grad():
            parameters.requires_grad_()
            optim = torch.optim.LBFGS(
                [parameters], max_iter=60, history_size=10, line_search_fn="strong_wolfe"
            )

            def objective() -> Tensor:
                optim.zero_grad()
                shift, slope, spread = parameters.split((dim, dim, 1))
                scaled = shift + slope * log_std + spread * offsets
                log_prob = log_weights - scaled - 0.5 * square * (-2.0 * scaled).exp()
                nll = -log_prob.logsumexp((0, 2)).sum() + n * dim * math.log(n_models)
                prior = (
                    (shift / _PRIOR[0]).square().sum()
                    + ((slope - 1.0) / _PRIOR[1]).square().sum()
                    # One spread serves all dimensions, so its prior counts as often.
                    + dim * (spread / _PRIOR[2]).square().sum()
                )
                loss = (nll + 0.5 * prior) / (n * dim)
                loss.backward()
                return loss

            optim.step(objective)
        found = parameters.detach()
        if not bool(torch.isfinite(found).all()):
            raise ValueError(
                "the calibration did not converge to finite numbers; look at the held-out "
                "transitions for outliers"
            )
        shift, slope, spread = found.split((dim, dim, 1))
        self.shift.copy_(shift)
        self.slope.copy_(slope)
        self.spread.copy_(spread.squeeze())
