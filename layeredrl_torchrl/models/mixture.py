"""The distribution over the next state: a mixture of Gaussians with independent dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

__all__ = ["GaussianMixture"]


class GaussianMixture(MixtureSameFamily):
    """A ``torch.distributions`` mixture of diagonal Gaussians with a marginal ``cdf``.

    >>> mixture = GaussianMixture(
    ...     loc=torch.tensor([[0.0], [2.0]]),
    ...     scale=torch.ones(2, 1),
    ...     weights=torch.tensor([0.5, 0.5]),
    ... )
    >>> mixture.mean, mixture.cdf(torch.tensor([1.0]))
    (tensor([1.]), tensor([0.5000]))

    Args:
        loc: Means ``[*B, J, D]`` of ``J`` components.
        scale: Standard deviations ``[*B, J, D]``, positive.
        weights: Probabilities ``[*B, J]``; a weight of exactly 0 is allowed.

    ``modes`` is the ``Normal`` over all components; ``batch_shape`` is ``*B``, ``event_shape``
    is ``[D]``.
    """

    def __init__(self, loc: Tensor, scale: Tensor, weights: Tensor) -> None:
        # The logit of a weight of 0 is -inf, chosen by where() because the gradient of log(0) is
        # NaN.
        present = weights > 0
        logits = torch.where(present, torch.where(present, weights, 1.0).log(), -torch.inf)
        self.modes = Normal(loc, scale, validate_args=False)
        super().__init__(
            Categorical(logits=logits, validate_args=False),
            Independent(self.modes, 1, validate_args=False),
            validate_args=False,
        )

    def expand(
        self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: Any = None
    ) -> GaussianMixture:
        """Expand to a larger batch shape."""
        batch = torch.Size(batch_shape)
        shape = (*batch, *self.modes.loc.shape[-2:])
        weights = self.mixture_distribution.probs.expand(*batch, -1)
        return GaussianMixture(
            self.modes.loc.expand(shape), self.modes.scale.expand(shape), weights
        )

    def cdf(self, value: Tensor) -> Tensor:
        """Return the marginal CDF of each dimension at ``value [*B, D]``, ``[*B, D]``."""
        probs = self.mixture_distribution.probs.unsqueeze(-1)
        return (probs * self.modes.cdf(value.unsqueeze(-2))).sum(-2)
