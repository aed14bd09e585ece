"""Whitening of state changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layeredrl_torchrl._checks import (
    check_finite,
    check_number,
    check_positive_int,
    check_width,
)
from layeredrl_torchrl._precision import rounding_of

__all__ = ["DeltaStandardizer"]


class DeltaStandardizer(nn.Module):
    r"""Maps changes of the state to uncorrelated ones of unit variance, ``W (delta - loc)``.

    With the standard deviations :math:`V^{1/2}` and the correlation matrix :math:`R` of a sample,

    .. math:: W = R^{-1/2} V^{-1/2},

    the ZCA-cor whitening of arXiv 1512.00809. Its outputs correlate more with its inputs than those
    of any other whitening, so dimension ``d`` keeps its meaning. It depends neither on the units
    nor, as Cholesky whitening would, on the order of the dimensions. It is computed in closed form;
    a linear map trained by gradient steps converges slowly.

    >>> standardizer = DeltaStandardizer(2)
    >>> delta = torch.randn(1000, 2) @ torch.tensor([[1.0, 3.0], [0.0, 4.0]])
    >>> standardizer.fit(delta)
    >>> standardizer(delta).T.cov().allclose(torch.eye(2), atol=0.01)
    True

    Args:
        dim: ``D``.
        min_eigenvalue: Smaller eigenvalues of :math:`R` (1 on average) are raised to this: in
            directions where the data hardly varies, whitening would magnify the model's error.

    Before :meth:`fit` it is the identity.
    """

    loc: Tensor  # [D], in units of the state
    whitening: Tensor  # [D, D], the matrix W, in one over units of the state

    def __init__(self, dim: int, *, min_eigenvalue: float = 1e-6) -> None:
        super().__init__()
        check_positive_int("dim", dim)
        check_number("min_eigenvalue", min_eigenvalue, 0.0, 1.0, open_low=True)
        self.min_eigenvalue = min_eigenvalue
        self.register_buffer("loc", torch.zeros(dim))
        self.register_buffer("whitening", torch.eye(dim))

    def forward(self, delta: Tensor) -> Tensor:
        """Standardise changes of the state ``[*B, D]``."""
        check_width("delta", delta, self.loc.numel(), hint="give next state minus state")
        return (delta - self.loc) @ self.whitening.mT

    @torch.no_grad()
    def fit(self, delta: Tensor) -> None:
        """Set the map from a sample of changes ``[N, D]``.

        A dimension that does not change (beyond rounding) keeps its unit.

        Raises:
            ValueError: A sample of another shape, without rows, or with NaN; nothing is changed.
        """
        dim = self.loc.numel()
        if delta.ndim != 2 or delta.shape[1] != dim or not len(delta):
            raise ValueError(
                f"expected a sample of shape [N, {dim}] with at least one row, got "
                f"{tuple(delta.shape)}"
            )
        check_finite("delta", delta, hint="repair the data first")
        # Double precision, since small eigenvalues are differences of large numbers.
        x = delta.double()
        std, loc = torch.std_mean(x, dim=0, correction=0)
        rounding = rounding_of(delta.dtype, self.loc.dtype)
        std = torch.where(std <= rounding * x.abs().amax(0), 1.0, std)
        x = (x - loc) / std
        correlation = x.mT @ x / len(x)
        # A constant dimension gets no correlation, and a variance of 1 like the others.
        constant = correlation.diagonal() < 0.5
        correlation[constant] = 0.0
        correlation[:, constant] = 0.0
        correlation.diagonal()[constant] = 1.0
        eigenvalues, axes = torch.linalg.eigh(correlation)
        root = eigenvalues.clamp_min(self.min_eigenvalue).rsqrt()
        self.loc.copy_(loc)
        self.whitening.copy_((axes * root) @ axes.mT / std)
