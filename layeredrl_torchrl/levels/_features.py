"""The input of a model-free level's networks, a normalised vector of features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchrl.data import TensorSpec

from layeredrl_torchrl._outliers import warn_of_outliers
from layeredrl_torchrl._precision import KeepsDoubles
from layeredrl_torchrl.nets import Normalizer
from layeredrl_torchrl.specs import action_features, width

__all__ = ["InputFeatures"]

# Number of standard deviations from the mean at which features are clipped: networks have no data
# beyond, and single outliers should not disturb them.
_LIMIT = 10.0


class InputFeatures(KeepsDoubles):
    """Concatenates observation, input from above and the remaining share of the duration.

    Each feature is standardised by the mean and standard deviation of all rows passed to
    :meth:`observe`, and clipped to ten standard deviations.

    Args:
        observation_dim: Width of an observation.
        input_spec: Spec of the input from above; ``None`` for none.
        duration: Number of actions on one input; ``None`` to leave out the remaining share.
    """

    n_seen: Tensor  # [] float64
    mean: Tensor  # [F] float64
    square: Tensor  # [F] float64, mean squared distance from the mean

    def __init__(
        self, observation_dim: int, input_spec: TensorSpec | None, duration: int | None
    ) -> None:
        super().__init__()
        self.input_spec, self.duration = input_spec, duration
        self.dim = observation_dim + (0 if input_spec is None else width(input_spec))
        self.dim += duration is not None
        self.normalizer = Normalizer(self.dim)
        self.register_buffer("n_seen", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(self.dim, dtype=torch.float64))
        self.register_buffer("square", torch.zeros(self.dim, dtype=torch.float64))

    def forward(
        self, observation: Tensor, given: Tensor | None, n_actions: Tensor | None
    ) -> Tensor:
        """Return the features ``[*B, F]``.

        Args:
            observation: ``[*B, obs]``.
            given: The input, in the form of its spec; ``None`` without ``input_spec``.
            n_actions: ``[*B, 1]``, actions on this input so far; ``None`` without ``duration``.
        """
        x = self.normalizer(self._join(observation, given, n_actions))
        return x.clamp(-_LIMIT, _LIMIT)

    def _join(self, observation: Tensor, given: Any, n_actions: Any) -> Tensor:
        dtype = self.normalizer.loc.dtype
        parts = [observation.to(dtype)]
        if self.input_spec is not None:
            parts.append(action_features(self.input_spec, given, dtype))
        if self.duration is not None:
            parts.append(1.0 - n_actions.to(dtype) / self.duration)
        return torch.cat(parts, -1)

    @torch.no_grad()
    def observe(self, observation: Tensor, given: Tensor | None, n_actions: Tensor | None) -> None:
        """Add ``[N]`` rows to the statistics.

        Means and squares of both samples are merged exactly (Chan et al., "Updating formulae and a
        pairwise algorithm for computing sample variances", 1979), so order and size of the calls do
        not matter.
        """
        x = self._join(observation, given, n_actions).double()
        square, mean = torch.var_mean(x, 0, correction=0)
        varied = ~self._constant()
        share = len(x) / (self.n_seen + len(x))
        gap = mean - self.mean
        self.n_seen += len(x)
        self.mean += share * gap
        self.square += share * (square - self.square + (1.0 - share) * gap.square())
        # Constant features are centred but not scaled.
        scale = torch.where(self._constant(), torch.ones_like(self.square), self.square.sqrt())
        self.normalizer.loc.copy_(self.mean)
        self.normalizer.scale.copy_(scale)
        n = int(self.n_seen)
        warn_of_outliers("observation", x, self.mean, scale, n=n, varied=varied)

    def _constant(self) -> Tensor:
        """Return which features are constant up to float32 rounding."""
        return self.square <= 1e-12 * (self.square + self.mean.square())
