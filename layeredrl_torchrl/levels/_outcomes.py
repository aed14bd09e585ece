"""How outcomes distinguish skills."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchrl.data import Bounded, TensorSpec

from layeredrl_torchrl._precision import KeepsDoubles
from layeredrl_torchrl.predictors import DeltaStandardizer
from layeredrl_torchrl.specs import action_features, is_discrete, width

__all__ = ["RunningMoments", "identifiability", "skill_features", "whitening_among"]

# Number of rewards after which the average forgets: a few thousand updates.
_WINDOW = 20_000.0


def identifiability(log_prob: Tensor) -> Tensor:
    r"""Compare how well its own skill and skills of the prior explain an outcome.

    .. math:: \log p(s' | s, z_0) - \log \frac{1}{n} \sum_{i=0}^{n-1} p(s' | s, z_i)

    With the other skills drawn from the prior, its mean is a lower bound of the mutual information
    between skill and outcome (arXiv 1807.03748). No value exceeds ``log n``, since the skill itself
    is among the ``n``.

    Args:
        log_prob: ``[*B, n]`` in nats; the executed skill is first.

    Returns:
        ``[*B]`` in nats.
    """
    # Subtract first: far from all predictions, log-densities are too large to be summed.
    relative = log_prob - log_prob[..., :1]
    return math.log(log_prob.shape[-1]) - relative.logsumexp(-1)


def skill_features(spec: TensorSpec, skills: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn skills ``[*B, ...]`` into features ``[*B, Z]`` with unit second moments."""
    features = action_features(spec, skills, dtype)
    if is_discrete(spec):
        return features * math.sqrt(width(spec))
    if not isinstance(spec, Bounded):
        return features
    low, high = spec.space.low.to(features), spec.space.high.to(features)
    return (features - (low + high) / 2) / (high - low) * math.sqrt(12.0)


def whitening_among(
    standardizer: DeltaStandardizer | None, state_dims: Sequence[int] | None, like: Tensor
) -> Tensor:
    """Return the matrix ``[D', D]`` that whitens changes of the state in ``state_dims``.

    Args:
        standardizer: The statistics of changes; ``None`` to leave changes in units of the state.
        state_dims: The dimensions, whitened among themselves; ``None`` for all.
        like: States ``[*B, D]``, for width, dtype and device.
    """
    if standardizer is None:
        every = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
        return every if state_dims is None else every[list(state_dims)]
    whitening: Tensor = standardizer.whitening
    if state_dims is None:
        return whitening
    # The inverse of the whitening's square is the covariance; the covariance of some dimensions is
    # a block of it. Double precision, since eigenvalues may differ by orders of magnitude.
    wide, dims = whitening.double(), list(state_dims)
    covariance = torch.linalg.inv(wide.mT @ wide)[dims][:, dims]
    std = covariance.diagonal().sqrt()
    eigenvalues, axes = torch.linalg.eigh(covariance / std / std.unsqueeze(1))
    root = eigenvalues.clamp_min(standardizer.min_eigenvalue).rsqrt()
    out = torch.zeros(len(std), whitening.shape[1], dtype=wide.dtype, device=wide.device)
    out[:, dims] = (axes * root) @ axes.mT / std
    return out.to(whitening)


class RunningMoments(KeepsDoubles):
    """Running mean and standard deviation of recent values.

    The first 20,000 values count equally; from then on older values are forgotten exponentially,
    since rewards change with the model that computes them.
    """

    n_seen: Tensor  # [] float64, at most the window
    mean: Tensor  # [] float64
    square: Tensor  # [] float64, mean of the squares

    def __init__(self) -> None:
        super().__init__()
        for name in ("n_seen", "mean", "square"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def observe(self, values: Tensor) -> None:
        """Add ``values [N]``."""
        values = values.to(self.mean)
        share = len(values) / (self.n_seen + len(values))
        self.mean += share * (values.mean() - self.mean)
        self.square += share * (values.square().mean() - self.square)
        self.n_seen.copy_((self.n_seen + len(values)).clamp_max(_WINDOW))

    def forward(self, values: Tensor) -> Tensor:
        """Standardise ``values [N]``."""
        variance = self.square - self.mean.square()
        # Variation below float64 rounding counts as none.
        varies = variance > 1e-12 * self.square
        std = torch.where(varies, variance.clamp_min(0.0).sqrt(), 1.0)
        return ((values.to(self.mean) - self.mean) / std).to(values.dtype)
