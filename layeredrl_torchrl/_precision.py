"""Where low precision pays off, and where it is avoided."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Self

import torch
from torch import Tensor, nn

__all__ = [
    "KeepsDoubles",
    "KeepsFloats",
    "full_precision",
    "product_dtype",
    "rounding_of",
    "uncached_autocast",
    "worthwhile_autocast",
]


class KeepsDoubles(nn.Module):
    """A module whose own float64 buffers stay float64 when the module is cast.

    They are counts and squares, for which lower precision is too coarse: in bfloat16 256 + 1 is
    256.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {
            name: value
            for name, value in self._buffers.items()
            if value is not None and value.dtype == torch.float64
        }
        super()._apply(fn, recurse)
        for name, value in kept.items():
            moved = self._buffers[name]
            self._buffers[name] = value if moved is None else value.to(moved.device)
        return self


class KeepsFloats(nn.Module):
    """A module whose own buffers stay float32 when the module is cast to lower precision.

    They are bounds of actions, which rounding may move outwards: in bfloat16 0.3 is 0.3008, an
    action that is not allowed.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, moved in self._buffers.items():
            value = before[name]
            if moved is not None and value is not None and _is_lower(moved.dtype):
                self._buffers[name] = value.to(moved.device, torch.float32)
        return self


def rounding_of(*dtypes: torch.dtype) -> float:
    """Return the relative change below which changes count as rounding in these dtypes."""
    return 1e-10 if all(dtype == torch.float64 for dtype in dtypes) else 1e-6


def _is_lower(dtype: torch.dtype) -> bool:
    """Whether ``dtype`` are floats of lower precision than float32."""
    return dtype.is_floating_point and dtype.itemsize < 4


def product_dtype(device: torch.device, dtype: torch.dtype, rows: int, width: int) -> torch.dtype:
    """Return the precision of ``torch.autocast`` where it saves time, else ``dtype``.

    A CPU without units for it multiplies bfloat16 more slowly than float32 (1.5 to 2 times in
    oneDNN with AVX512), and a CPU with AVX512_BF16 or AMX two to four times as fast. So products of
    about ``rows`` rows and ``width`` columns are timed once per process.
    """
    if not _is_on(device):
        return dtype
    low = torch.get_autocast_dtype(device.type)
    return low if _pays(device, low, rows, width) else dtype


def worthwhile_autocast(
    device: torch.device, rows: int, width: int
) -> AbstractContextManager[object]:
    """Keep ``torch.autocast`` where it saves time, and switch it off elsewhere."""
    if not _is_on(device):
        return nullcontext()
    if _pays(device, torch.get_autocast_dtype(device.type), rows, width):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Switch ``torch.autocast`` off, without overhead if it is off already."""
    if _is_on(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _is_on(device: torch.device) -> bool:
    """Whether autocast is on; some devices (``"meta"``) have none."""
    kind = device.type
    # Torch 2.11 cannot trace the first call; compiled code is on a device that has autocast.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    return known and torch.is_autocast_enabled(kind)


def uncached_autocast(device_type: str) -> AbstractContextManager[object]:
    """Keep ``torch.autocast``, but without its cache of cast weights, which learning changes.

    Do nothing if it is off.
    """
    if not _is_on(torch.device(device_type)):
        return nullcontext()
    dtype = torch.get_autocast_dtype(device_type)
    return torch.autocast(device_type, dtype, cache_enabled=False)


def _pays(device: torch.device, low: torch.dtype, rows: int, width: int) -> bool:
    # Traced code, and code that only propagates shapes, cannot be timed.
    if (
        device.type != "cpu"
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
    ):
        return True
    return _is_faster(low, _power_of_2(rows, 16, 1024), _power_of_2(width, 32, 512))


def _power_of_2(n: int, low: int, high: int) -> int:
    return min(max(1 << (max(n, 1) - 1).bit_length(), low), high)


@cache
def _is_faster(low: torch.dtype, rows: int, width: int) -> bool:
    """Time in a few milliseconds whether a product is faster in ``low`` than in float32."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        x, weight = torch.ones(rows, width), torch.ones(width, width)
        n = max(1, 2**22 // (rows * width))  # enough to be timed
        fastest = []
        for dtype in (torch.float32, low):
            left, right = x.to(dtype), weight.to(dtype)
            left @ right
            seconds = []
            for _ in range(4):
                start = time.perf_counter()
                for _ in range(n):
                    left @ right
                seconds.append(time.perf_counter() - start)
            fastest.append(min(seconds))
    return fastest[1] < 0.9 * fastest[0]
