"""Random actions, drawn on the device where they are used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchrl.data import Bounded, OneHot, TensorSpec

from layeredrl_torchrl._precision import KeepsFloats
from layeredrl_torchrl.specs import is_discrete, width

__all__ = ["RandomActions"]


class RandomActions(KeepsFloats):
    """Draws actions of a spec: uniform within bounds or among choices, otherwise normal.

    TorchRL's ``spec.rand`` draws on the spec's device, from where actions would have to be copied;
    here the bounds are buffers that move with the level.

    Args:
        spec: Spec of one action. Dimensions without finite bounds are drawn from a standard normal
            distribution and clipped.
    """

    low: Tensor  # [A]
    high: Tensor  # [A]

    def __init__(self, spec: TensorSpec) -> None:
        super().__init__()
        self.spec = spec
        bounded = isinstance(spec, Bounded)
        zeros = torch.zeros(() if is_discrete(spec) else spec.shape)
        low = spec.space.low.float() if bounded else zeros - torch.inf
        high = spec.space.high.float() if bounded else zeros + torch.inf
        self.register_buffer("low", low.clone(), persistent=False)
        self.register_buffer("high", high.clone(), persistent=False)

    def forward(self, batch: Sequence[int]) -> Tensor:
        """Draw independent actions ``[*B, A]``, or discrete ones in the form of the spec."""
        spec, device = self.spec, self.low.device
        if is_discrete(spec):
            choice = torch.randint(width(spec), tuple(batch), device=device)
            if isinstance(spec, OneHot):
                choices = torch.arange(width(spec), device=device)
                return (choice.unsqueeze(-1) == choices).to(spec.dtype)
            return choice.to(spec.dtype).reshape((*batch, *spec.shape))
        span, shape = self.high - self.low, (*batch, *spec.shape)
        uniform = self.low + span * torch.rand(shape, dtype=self.low.dtype, device=device)
        normal = torch.randn(shape, dtype=self.low.dtype, device=device)
        draw = torch.where(span.isfinite(), uniform, normal)
        return torch.minimum(torch.maximum(draw, self.low), self.high).to(spec.dtype)
