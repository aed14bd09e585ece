"""Replay buffers of every kind."""

from __future__ import annotations

import pytest
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ReplayBuffer, TensorDictReplayBuffer


@pytest.fixture(scope="module")
def make_buffer(tmp_path_factory):
    """Makes an empty buffer: memory-mapped or not, a TensorDictReplayBuffer or a ReplayBuffer."""

    def make(memmap, with_index, capacity, ndim=1):
        if memmap:
            storage = LazyMemmapStorage(
                capacity, ndim=ndim, scratch_dir=tmp_path_factory.mktemp("storage")
            )
        else:
            storage = LazyTensorStorage(capacity, ndim=ndim)
        return (TensorDictReplayBuffer if with_index else ReplayBuffer)(
            storage=storage, batch_size=7
        )

    return make
