"""Checks of tensors at the public calls, and the wording of the errors they raise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_width(name: str, tensor: Tensor, width: int, *, hint: str) -> None:
    """Raise ``ValueError`` unless ``tensor`` is a float tensor of shape ``[..., width]``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}; {hint}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a float tensor, got dtype {tensor.dtype}; {hint}")
    if tensor.ndim == 0 or tensor.shape[-1] != width:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected [..., {width}]; {hint}")


def check_finite(name: str, tensor: Tensor, *, hint: str) -> None:
    """Raise ``ValueError`` if ``tensor`` holds NaN or infinity, saying how many and where first."""
    # One reduction decides the common case; the details are worked out only for the message.
    # NaN and inf both survive a sum of absolute values; an overflow of finite values does not
    # pass the elementwise test below and so raises nothing.
    if tensor.numel() == 0 or bool(torch.isfinite(tensor.detach().abs().sum())):
        return
    bad = ~torch.isfinite(tensor)
    if not bool(bad.any()):
        return
    first = tuple(bad.nonzero()[0].tolist())
    raise ValueError(
        f"{name} holds {int(bad.sum())} non-finite values of {tensor.numel()} "
        f"(the first, {tensor[first].item()}, at index {list(first)}); {hint}"
    )


def check_per_item(name: str, value: Tensor, batch: Sequence[int]) -> Tensor:
    """Return what the function ``name`` gave if it is one number for each of ``[*B]`` items.

    Only shapes are looked at, so this waits for no device.

    Raises:
        TypeError: No tensor. ValueError: Another shape, also one that would broadcast.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} gave a {type(value).__name__}, expected a tensor [*B]")
    if value.shape != torch.Size(batch):
        raise ValueError(
            f"{name} gave shape {tuple(value.shape)}, expected {tuple(batch)}: one value for each "
            "state, [*B], from state [*B, D], context [*B, C] and action [*B, A]; write it for any "
            "batch shape, and reduce the last axis (sum(-1), squeeze(-1))"
        )
    return value


def check_positive_int(name: str, value: int, *, minimum: int = 1) -> int:
    """Return ``value`` if it is an ``int`` of at least ``minimum``; raise otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value
