"""The optimizer of a predictor's parts, and their learning rates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from layeredrl_torchrl._state import refuse_other_shapes

__all__ = ["LearningRate", "annealing", "current_rates", "gradient_norms", "make_optimizer"]

LearningRate: TypeAlias = float | Callable[[int], float]


def make_optimizer(parts: Mapping[str, object], model_weight_decay: float) -> torch.optim.AdamW:
    """One optimizer with a group called ``name`` for each part that has trainable parameters.

    Where the decay is 0, ``AdamW`` takes the steps of ``Adam``, bit for bit. The learning rates
    are set at each update.
    """
    if not 0.0 <= model_weight_decay < float("inf"):
        raise ValueError(
            f"model_weight_decay is {model_weight_decay}, expected a finite number of at least 0"
        )
    groups = []
    for name, part in parts.items():
        parameters = (
            [p for p in part.parameters() if p.requires_grad] if isinstance(part, nn.Module) else []
        )
        if parameters:
            decay = model_weight_decay if name == "model" else 0.0
            groups.append({"params": parameters, "name": name, "lr": 0.0, "weight_decay": decay})
    optim = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)
    refuse_other_shapes(optim)
    return optim


def gradient_norms(optim: torch.optim.Optimizer) -> tuple[list[list[Tensor]], list[Tensor]]:
    """The gradients of each group of parameters, and the norm of each group's, a scalar."""
    grads = [[p.grad for p in g["params"] if p.grad is not None] for g in optim.param_groups]
    each = torch._foreach_norm([grad for group in grads for grad in group])
    norms = torch.stack(each).split([len(group) for group in grads])
    return grads, [torch.linalg.vector_norm(group) for group in norms]


def current_rates(rates: Mapping[str, LearningRate], n_total_env_steps: int) -> dict[str, float]:
    """The learning rate of each part after so many environment steps.

    Raises:
        ValueError: One that is negative or not finite.
    """
    current = {
        name: float(rate(n_total_env_steps) if callable(rate) else rate)
        for name, rate in rates.items()
    }
    for name, rate in current.items():
        if not 0.0 <= rate < float("inf"):
            raise ValueError(f"{name}_lr is {rate}, expected a finite number of at least 0")
    return current


def annealing(update: int, n_updates: int, share: float) -> float:
    """Factor of a learning rate that falls linearly to a tenth over the last ``share`` updates."""
    left = 1.0 - (update + 0.5) / n_updates
    return min(1.0, 0.1 + 0.9 * left / share) if share else 1.0
