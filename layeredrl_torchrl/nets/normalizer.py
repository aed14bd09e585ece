"""Per-feature standardisation; only ``fit`` changes its statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layeredrl_torchrl._checks import check_finite
from layeredrl_torchrl._precision import rounding_of

__all__ = ["Normalizer"]


class Normalizer(nn.Module):
    """Maps ``x`` to ``(x - loc) / scale``; ``loc = 0`` and ``scale = 1`` until :meth:`fit`.

    With ``clip``, the result is clipped to the range of the fitted data, widened by a tenth of it
    on both sides: for inputs unlike its data, a network predicts no better than for the nearest
    ones in that range.

    TorchRL's ``ObservationNorm`` and ``VecNormV2`` normalise the stream of an environment. This
    module is part of a network and does not change while the network is evaluated.

    >>> normalizer = Normalizer(1)
    >>> normalizer.fit(torch.tensor([[1.0], [3.0]]))
    >>> normalizer(torch.tensor([5.0]))
    tensor([3.])

    Args:
        dim: Number of features ``n``.
        clip: Whether to clip results to the range of the data.
    """

    loc: Tensor  # [n]
    scale: Tensor  # [n]
    low: Tensor  # [n]
    high: Tensor  # [n]

    def __init__(self, dim: int, *, clip: bool = False) -> None:
        super().__init__()
        self.clip = clip
        if clip:
            self.register_buffer("low", torch.full((dim,), -torch.inf))
            self.register_buffer("high", torch.full((dim,), torch.inf))
        self.register_buffer("loc", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Standardise ``x [..., n]``."""
        x = (x - self.loc) / self.scale
        return torch.clamp(x, self.low, self.high) if self.clip else x

    def check(self, x: Tensor) -> None:
        """Raise if :meth:`fit` would; nothing is changed."""
        dim = self.loc.numel()
        if x.ndim != 2 or x.shape[1] != dim or not len(x):
            raise ValueError(
                f"expected a sample of shape [N, {dim}] with at least one row, got {tuple(x.shape)}"
            )
        check_finite("sample", x, hint="repair the data first")

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Set the statistics to mean and standard deviation of ``x [N, n]``, floats or integers.

        A feature that does not vary (beyond rounding, of float32 or float64) keeps ``scale = 1``:
        it is centred, and its rounding errors are not magnified.

        Raises:
            ValueError: A sample of another shape, without rows, or with NaN; nothing is changed.
        """
        self.check(x)
        if not x.shape[1]:
            return
        if not x.is_floating_point() or x.dtype.itemsize < 4:
            x = x.to(torch.promote_types(self.loc.dtype, torch.float32))
        # First scale the sample to [-1, 1]: otherwise squares of large numbers overflow, and small
        # deviations from a large mean are lost.
        low, high = x.amin(0), x.amax(0)
        center, half = low / 2 + high / 2, high / 2 - low / 2
        unit = torch.where(half > 0, half, 1.0)
        std, mean = torch.std_mean((x - center) / unit, dim=0, correction=0)
        std, mean = std * unit, center + mean * unit
        rounding = rounding_of(x.dtype, self.loc.dtype)
        constant = std <= rounding * torch.maximum(low.abs(), high.abs())
        std = torch.where(constant, 1.0, std)
        if self.clip:
            margin = 0.1 * (high - low)
            self.low.copy_((low - margin - mean) / std)
            self.high.copy_((high + margin - mean) / std)
        self.loc.copy_(mean)
        self.scale.copy_(std)
