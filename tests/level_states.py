"""All that learning changes in a level, to be compared."""

from __future__ import annotations

import torch


def everything(level):
    """All that learning changes, as copies."""
    writer, storage = level.buffer.writer.state_dict(), level.buffer.storage
    rows = storage[:].to_dict() if len(storage) else None
    optim = {str(i): s for i, s in level.optim.state_dict()["state"].items()}
    state = {"level": dict(level.state_dict()), "optim": optim, "writer": writer, "rows": rows}
    return torch.utils._pytree.tree_map(
        lambda x: x.clone() if isinstance(x, torch.Tensor) else x, state
    )


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
