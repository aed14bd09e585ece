"""Buffers, and steps for them."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer


def make_buffer(size=40, ndim=1, **kwargs):
    return TensorDictReplayBuffer(storage=LazyTensorStorage(size, ndim=ndim), **kwargs)


def steps(n, *batch):
    shape = (*batch, n)
    return TensorDict(
        {"obs": torch.randn(*shape, 2), "next": {"obs": torch.rand(*shape, 2)}}, shape
    )
