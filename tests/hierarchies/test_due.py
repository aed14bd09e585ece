"""Work on some instances of a batch, on a CPU and as on an accelerator."""

from __future__ import annotations

import itertools

import pytest
import torch
from tensordict import TensorDict

from layeredrl_torchrl import _watch
from layeredrl_torchrl.hierarchies._due import Due

BATCHES = [(), (4,), (2, 3)]


@pytest.mark.parametrize("at_once", [("cpu",), ()], ids=["cpu", "accelerator"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_what_is_due_is_replaced_and_nothing_else(monkeypatch, at_once, batch, share):
    monkeypatch.setattr(_watch._WATCH, "at_once", at_once)
    torch.manual_seed(1)
    mask = torch.rand(*batch, 1) < share
    due, whole = Due(mask), torch.randn(*batch, 3, 2)
    merged = due.merge(whole, 10 * due.pick(whole))
    flat = due.merge(whole[..., 0], 10 * due.pick(whole[..., 0]))
    td = TensorDict({"x": whole.clone()}, batch)
    merged_td = due.merge(td, due.pick(td).apply(lambda x: 10 * x))
    written = whole[..., 0].clone()
    due.write(written, 10 * due.pick(whole[..., 0]))
    for place in itertools.product(*map(range, batch)):
        expected = whole[place] * (10 if mask[place] else 1)
        assert torch.equal(merged[place], expected)
        assert torch.equal(merged_td["x"][place], expected)
        for found in (flat, written):
            assert torch.equal(found[place], expected[..., 0])
