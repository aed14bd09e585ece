"""How many rows a CPU takes at once: no more than its caches hold, and not many fewer."""

from __future__ import annotations

import itertools

import pytest
import torch

from layeredrl_torchrl.models._blocks import starts_at_once

CPU, CACHED = torch.device("cpu"), 2**18


@pytest.mark.parametrize("width", [1, 300, 4096, 2**20])
def test_a_block_fills_the_caches_and_no_more(width):
    for n, n_particles in itertools.product((1, 7, 100, 10**6), (1, 4, 50)):
        with torch.no_grad():
            block = starts_at_once(n, n_particles, width, CPU)
        floats = n_particles * width
        if n * floats <= CACHED:
            assert block == n
        else:
            assert block == 1 or block * floats <= CACHED
            assert (block + 1) * floats > CACHED / 2  # rows are taken in tiles of 64
            assert 1 <= block < max(n, 2)
            rows = CACHED // width
            assert rows <= 64 or block == max((rows - rows % 64) // n_particles, 1)


@pytest.mark.parametrize(
    ("width", "device", "grad"),
    [(0, CPU, False), (200, torch.device("meta"), False), (200, CPU, True)],
    ids=["unknown", "no cpu", "gradients"],
)
def test_all_at_once_where_blocks_save_nothing(width, device, grad):
    with torch.set_grad_enabled(grad):
        assert starts_at_once(10**6, 4, width, device) == 10**6
