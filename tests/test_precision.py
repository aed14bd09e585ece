"""Which buffers keep their precision when a module is cast, and which sizes are timed."""

from __future__ import annotations

import pytest
import torch

from layeredrl_torchrl._precision import KeepsDoubles, KeepsFloats, _power_of_2


def build(kind):
    part = kind()
    part.register_buffer("wide", torch.tensor([257.0], dtype=torch.float64))
    part.register_buffer("narrow", torch.tensor([0.3]))
    part.register_buffer("count", torch.tensor([257]))
    part.register_buffer("none", None)
    part.inner = torch.nn.Linear(2, 2)
    return part


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_counts_stay_doubles_and_bounds_stay_floats(dtype):
    doubles, floats = build(KeepsDoubles), build(KeepsFloats)
    for part in (doubles, floats):
        assert part.to(dtype) is part
        assert part.inner.weight.dtype == dtype
        assert part.count.dtype == torch.int64
        assert part.none is None
    assert doubles.wide.dtype == torch.float64
    assert doubles.wide.item() == 257.0
    assert doubles.narrow.dtype == dtype
    expected = dtype if dtype.itemsize >= 4 else torch.float32
    assert floats.narrow.dtype == floats.wide.dtype == expected
    assert floats.narrow.item() == pytest.approx(0.3, abs=1e-7)  # and not what bfloat16 makes of it
    assert floats.wide.item() == 257.0
    for part in (doubles, floats):
        assert {x.device.type for x in part.to("meta").buffers()} == {"meta"}


def test_products_are_timed_at_powers_of_two():
    found = {n: _power_of_2(n, 16, 1024) for n in (0, 1, 16, 17, 32, 33, 513, 1024, 1025, 9999)}
    assert list(found.values()) == [16, 16, 16, 32, 32, 64, 1024, 1024, 1024, 1024]
