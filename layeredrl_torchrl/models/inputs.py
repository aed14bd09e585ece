"""What both ways of stepping an ensemble do to its inputs, put side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from layeredrl_torchrl.nets import StackedProbFCDynamics
from layeredrl_torchrl.specs import is_discrete

if TYPE_CHECKING:
    from layeredrl_torchrl.models.ensemble import ProbabilisticEnsemble

__all__ = ["InputStatistics", "check_parameters", "excess_std"]


class InputStatistics(NamedTuple):
    """Inputs ``x [..., in]`` become ``clamp(offset + factor * x, low, high)``."""

    factor: Tensor
    offset: Tensor
    low: Tensor | None  # None where nothing is clipped
    high: Tensor | None

    @classmethod
    def of(
        cls, ensemble: ProbabilisticEnsemble, members: StackedProbFCDynamics, n_more: int = 0
    ) -> InputStatistics | None:
        """The statistics ``[in + n_more]``, ``None`` for an ensemble that uses inputs as they are.

        Choices, and ``n_more`` inputs behind all, stay what they are.
        """
        if not ensemble.normalize_inputs:
            return None
        parts = [ensemble.state_normalizer]
        if not members.ignore_context:
            parts.append(ensemble.context_normalizer)
        if not is_discrete(ensemble.action_spec):
            parts.append(ensemble.action_normalizer)
        loc, scale = torch.cat([p.loc for p in parts]), torch.cat([p.scale for p in parts])
        n_plain = members.weights[0].shape[1] + n_more - len(loc)
        factor = F.pad(scale.reciprocal(), (0, n_plain), value=1.0)
        offset = F.pad(-loc / scale, (0, n_plain))
        if not ensemble.state_normalizer.clip:
            return cls(factor, offset, None, None)
        low = F.pad(torch.cat([p.low for p in parts]), (0, n_plain), value=-torch.inf)
        high = F.pad(torch.cat([p.high for p in parts]), (0, n_plain), value=torch.inf)
        # Before there are statistics, nothing lies outside.
        clips = bool((low.isfinite() | high.isfinite()).any())
        return cls(factor, offset, low if clips else None, high if clips else None)

    def as_columns(self) -> InputStatistics:
        """The same for inputs ``[..., in, R]``."""
        low = None if self.low is None else self.low.unsqueeze(-1)
        high = None if self.high is None else self.high.unsqueeze(-1)
        return InputStatistics(self.factor.unsqueeze(-1), self.offset.unsqueeze(-1), low, high)


def excess_std(excess: Tensor, dim: int = -1) -> Tensor:
    """What lies beyond the data adds to the normalised std: ``dim`` becomes 1.

    The distance from the range of the data, in standard deviations of the inputs, and at most 1:
    far from the data the prediction is no sharper than the spread of all that was seen.
    """
    return torch.linalg.vector_norm(excess, dim=dim, keepdim=True).clamp(max=1.0)


def check_parameters(members: StackedProbFCDynamics) -> None:
    """Raise ``ValueError`` for members with parameters that are not finite, and name them."""
    parameters = [*members.weights, *members.biases]
    if bool(torch.isfinite(torch.stack([p.sum() for p in parameters]).sum())):
        return
    bad = torch.stack([(~torch.isfinite(p)).flatten(1).any(1) for p in parameters]).any(0)
    found = bad.nonzero().flatten().tolist()
    if found:
        raise ValueError(
            f"member(s) {found} of {len(bad)} have parameters that are not finite; the model has "
            "diverged: lower its learning rate, or check the data it was trained on"
        )
