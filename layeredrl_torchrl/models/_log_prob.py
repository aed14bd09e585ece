"""The log-density of a mixture, from the differences to its means."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from layeredrl_torchrl._checks import check_finite, check_number
from layeredrl_torchrl._watch import refuse
from layeredrl_torchrl.models.mixture import GaussianMixture

__all__ = ["NO_DENSITY", "mixture_log_prob"]

NO_DENSITY = (
    "the model predicts a standard deviation of 0, so the next state has no density; use predict() "
    "or rollout(), or give get_log_prob() a fixed std"
)


def mixture_log_prob(
    difference: Tensor,
    weights: Tensor,
    scale: Tensor,
    std: Tensor | float | None = None,
    transform: Tensor | Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the log-density ``[*B]`` of the mixture of all members, in equal shares.

    Args:
        difference: Next state minus the predicted means, ``[*B, M, K, D]``.
        weights: ``[*B, M, K]``.
        scale: Predicted std ``[*B, M, K, D]``.
        std: Replaces ``scale``: a number or a tensor that broadcasts to ``[D']``.
        transform: Applied to ``difference``: ``[D', D]`` or a callable on ``[..., D]``.

    Raises:
        ValueError: ``transform`` without ``std`` or of another shape; a std that is not positive.
    """
    if transform is not None:
        if std is None:
            raise ValueError("transform needs a fixed std; pass std= as well")
        if isinstance(transform, Tensor):
            dim = difference.shape[-1]
            if transform.ndim != 2 or transform.shape[1] != dim:
                raise ValueError(
                    f"transform has shape {tuple(transform.shape)}, expected [D', {dim}]"
                )
            check_finite("transform", transform, hint="repair it first")
            difference = difference @ transform.to(difference).mT
        else:
            difference = transform(difference)
    if std is not None:
        if isinstance(std, Tensor):
            fixed = std.to(difference)
        else:
            top = torch.finfo(difference.dtype).max
            fixed = difference.new_full((), check_number("std", std, 0.0, top, open_low=True))
        wrong = ~((fixed > 0) & fixed.isfinite()).all()
        refuse(wrong, lambda _: ValueError(f"std must be positive and finite, got {std}"))
        if fixed.ndim > 1 or fixed.numel() not in (1, difference.shape[-1]):
            raise ValueError(
                f"std has shape {tuple(fixed.shape)}, expected a number or [{difference.shape[-1]}]"
            )
        scale = fixed.expand_as(difference)
    else:
        refuse(~(scale > 0).all(), lambda _: ValueError(NO_DENSITY))
    mixture = GaussianMixture(
        torch.zeros_like(difference).flatten(-3, -2),
        scale.flatten(-3, -2),
        weights.flatten(-2) / weights.shape[-2],
    )
    # Each component has its own difference, so evaluate the mixture component by component.
    log_prob = mixture.modes.log_prob(difference.flatten(-3, -2)).sum(-1)
    return (log_prob + mixture.mixture_distribution.logits).logsumexp(-1)
