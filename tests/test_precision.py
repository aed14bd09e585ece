"""Which buffers keep their precision when a module is cast, and which sizes are timed."""

from __future__ import annotations

import pytest
import torch

from layeredrl_torchrl import _precision
from layeredrl_torchrl._precision import (
    KeepsDoubles,
    KeepsFloats,
    full_precision,
    product_dtype,
    uncached_autocast,
    worthwhile_autocast,
)

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("faster", [True, False])
def test_autocast_is_followed_where_it_was_found_to_be_faster(faster, monkeypatch):
    seen = []

    def is_faster(low, rows, width):
        seen.append((low, rows, width))
        return faster

    monkeypatch.setattr(_precision, "_is_faster", is_faster)
    assert product_dtype(CPU, torch.float32, 20, 100) == torch.float32
    with worthwhile_autocast(CPU, 20, 100):
        assert not torch.is_autocast_enabled("cpu")
    assert not seen  # nobody asks for lower precision
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.bfloat16 if faster else torch.float32
        assert product_dtype(CPU, torch.float32, 20, 100) == expected
        with worthwhile_autocast(CPU, 20, 100):
            assert torch.is_autocast_enabled("cpu") is faster
        with full_precision(CPU):
            assert not torch.is_autocast_enabled("cpu")
        with full_precision(torch.device("meta")):  # which has none
            assert torch.is_autocast_enabled("cpu")
        assert product_dtype(torch.device("meta"), torch.float32, 20, 100) == torch.float32
    assert seen == [(torch.bfloat16, 32, 128)] * 2


def test_products_are_timed_at_powers_of_two(monkeypatch):
    """Of 16 to 1024 rows and 32 to 512 columns."""
    seen = []
    monkeypatch.setattr(_precision, "_is_faster", lambda *x: seen.append(x[1:]))
    with torch.autocast("cpu", torch.bfloat16):
        for n in (0, 1, 16, 17, 32, 33, 512, 513, 1024, 1025, 9999):
            product_dtype(CPU, torch.float32, n, n)
    rows, widths = zip(*seen, strict=True)
    assert rows == (16, 16, 16, 32, 32, 64, 512, 1024, 1024, 1024, 1024)
    assert widths == (32, 32, 32, 32, 32, 64, 512, 512, 512, 512, 512)


def test_casts_of_weights_that_learning_changes_are_not_remembered():
    with uncached_autocast("cpu"):
        assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.is_autocast_cache_enabled()
        with uncached_autocast("cpu"):
            assert torch.is_autocast_enabled("cpu")
            assert torch.get_autocast_dtype("cpu") == torch.bfloat16
            assert not torch.is_autocast_cache_enabled()
