"""The distribution over the next state: a mixture of Gaussians with independent dimensions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

__all__ = ["GaussianMixture"]


class GaussianMixture(MixtureSameFamily):
    """A ``torch.distributions`` mixture of diagonal Gaussians with marginal ``cdf``.

    Args:
        loc: Means ``[*B, J, D]`` of ``J`` components.
        scale: Standard deviations ``[*B, J, D]``, positive.
        weights: Probabilities ``[*B, J]``; a weight of exactly 0 is allowed.

    ``modes`` is the ``Normal`` over all components; ``batch_shape`` is ``*B``, ``event_shape``
    is ``[D]``.
    """

    def __init__(self, loc: Tensor, scale: Tensor, weights: Tensor) -> None:
        # log(0) = -inf is what a weight of 0 means to logsumexp, but its gradient is NaN; the
        # smallest normal number instead gives -87 in float32 and a finite gradient.
        logits = weights.clamp_min(torch.finfo(weights.dtype).tiny).log()
        self.modes = Normal(loc, scale, validate_args=False)
        super().__init__(
            Categorical(logits=logits, validate_args=False),
            Independent(self.modes, 1, validate_args=False),
            validate_args=False,
        )

    def cdf(self, value: Tensor) -> Tensor:
        """Marginal cumulative distribution of each dimension at ``value [*B, D]``: ``[*B, D]``."""
        probs = self.mixture_distribution.probs.unsqueeze(-1)
        return (probs * self.modes.cdf(value.unsqueeze(-2))).sum(-2)
