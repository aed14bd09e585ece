"""Per-feature standardisation with statistics that only ``fit`` changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Normalizer"]


class Normalizer(nn.Module):
    """Maps ``x`` to ``(x - loc) / scale``; ``loc = 0`` and ``scale = 1`` until :meth:`fit`.

    TorchRL's ``ObservationNorm`` and ``VecNormV2`` normalise an environment's stream; this one
    sits inside a network, is invertible, and never changes while the network is evaluated.

    Args:
        dim: Number of features ``n``.
    """

    loc: Tensor  # [n]
    scale: Tensor  # [n]

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Standardise ``x [..., n]``."""
        return (x - self.loc) / self.scale

    def inverse(self, x: Tensor) -> Tensor:
        """Undo :meth:`forward`."""
        return x * self.scale + self.loc

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Set the statistics to mean and standard deviation of ``x [N, n]``.

        A feature that does not vary (beyond float32 rounding) keeps ``scale = 1``, so that it is
        centred but not blown up.
        """
        std, mean = torch.std_mean(x.to(self.loc.dtype), dim=0, correction=0)
        constant = std <= 1e-6 * (1.0 + mean.abs())
        self.loc.copy_(mean)
        self.scale.copy_(torch.where(constant, torch.ones_like(std), std))
