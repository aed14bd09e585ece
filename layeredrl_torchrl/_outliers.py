"""A warning of features whose spread comes from a few rows."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from layeredrl_torchrl._watch import refuse

__all__ = ["warn_of_outliers"]

# Minimum number of rows.
_LEAST = 100


def warn_of_outliers(
    name: str,
    x: Tensor,
    loc: Tensor,
    scale: Tensor,
    *,
    n: int | None = None,
    varied: Tensor | None = None,
    stacklevel: int = 4,
) -> None:
    """Warn if a thousandth of the rows causes the spread of a feature that also varies elsewhere.

    A feature that is constant except in a few rows, such as a sparse reward, is fine.

    Args:
        name: Name of the features, for the message.
        x: ``[m, F]``.
        loc: Mean of all rows, ``[F]``.
        scale: Their standard deviation.
        n: Number of all rows, of which ``x`` are the last; ``m`` by default.
        varied: Whether the rows before ``x`` differed, bool ``[F]``.
        stacklevel: Stack level of the warning.
    """
    n = len(x) if n is None else n
    if n < _LEAST or not x.numel():
        return
    distance = ((x - loc) / scale).abs()
    n_far = max(1, n // 1000)
    far = distance.topk(min(n_far + 1, len(x)), dim=0).values
    if len(x) <= n_far:  # the next value is among the earlier rows
        far = torch.cat((far, torch.zeros_like(far[:1])))
    count = torch.arange(1, len(far), device=x.device).unsqueeze(-1)
    rest = (n - far[:-1].square().cumsum(0)) / (n - count)
    # Outliers: a gap with nearly all of the variance beyond it.
    broken = (rest < 1e-2) & (far[:-1] > 20.0 * far[1:]) & (far[0] > 5.0)
    varies = (x != x.median(0).values).sum(0) > 2 * n_far
    varies = varies if varied is None else varies | varied

    def warn(found: Tensor) -> None:
        dims = found.nonzero().flatten().tolist()
        values = [f"{x[:, d][distance[:, d].argmax()].item():.4g}" for d in dims]
        warnings.warn(
            f"{name}: a few of {n} rows make up the spread of dimension(s) {dims} (up to "
            f"{', '.join(values)}); if these readings are broken, remove them from the data, since "
            "the networks can hardly tell the others apart on that scale",
            stacklevel=stacklevel,
        )

    refuse(broken.any(0) & varies, warn)
