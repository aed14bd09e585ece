"""Whether low-precision products are worth having on a machine."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

__all__ = ["full_precision", "product_dtype", "worthwhile_autocast"]


@cache
def _has_bf16_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones (AMX)."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The precision that ``torch.autocast`` asks for, where it saves time, else ``dtype``.

    Without bfloat16 matrix units a CPU multiplies bfloat16 more slowly than float32 (1.5 to 2
    times in oneDNN with AVX512), so there the request is not followed.
    """
    if not torch.is_autocast_enabled(device.type):
        return dtype
    if device.type == "cpu" and not _has_bf16_units():
        return dtype
    return torch.get_autocast_dtype(device.type)


def worthwhile_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Leaves ``torch.autocast`` as it is where it saves time, and switches it off elsewhere."""
    if torch.is_autocast_enabled(device.type) and device.type == "cpu" and not _has_bf16_units():
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Switches ``torch.autocast`` off; nothing where it is off, which takes no time."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
