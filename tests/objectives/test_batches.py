"""Numbers that are a fixed function of a row's content, and what is drawn with them."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from layeredrl_torchrl import BootstrappedBatches
from layeredrl_torchrl.objectives.batches import fingerprint, hashed_uniform

GRID = torch.cartesian_prod(torch.arange(64.0), torch.arange(64.0))


@pytest.mark.parametrize(
    "rows",
    [torch.rand(4096, 3), GRID, GRID * 1e-6, torch.eye(4096), GRID.long()],
    ids=["random", "grid", "small grid", "one-hot", "integers"],
)
def test_rows_that_differ_have_fingerprints_that_differ(rows):
    assert len(fingerprint(rows).unique()) == len(rows.unique(dim=0))
    torch.testing.assert_close(fingerprint(rows.flip(0)), fingerprint(rows).flip(0))


def test_which_tensor_and_which_column_a_value_is_in_counts():
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    ways = [(one, zero), (zero, one), (torch.cat([one, zero], 1),), (torch.cat([zero, one], 1),)]
    assert len({fingerprint(*way).item() for way in ways}) == 4


@pytest.mark.parametrize("rows", [torch.rand(4096, 3), GRID], ids=["random", "grid"])
def test_hashed_numbers_are_uniform_and_independent_of_content_and_salt(rows):
    salts = (-2, 0, 1, 2, 5, (7 << 16) + 4)
    uniform = torch.stack([hashed_uniform(fingerprint(rows), salt) for salt in salts])
    assert uniform.min() >= 0
    assert uniform.max() < 1
    # Kolmogorov-Smirnov: the largest gap stays below 2.2 / sqrt(n) with probability 0.9999.
    levels = torch.arange(1, 4097) / 4096
    assert (uniform.sort(-1).values - levels).abs().max() < 2.2 / 64
    together = torch.corrcoef(torch.cat([uniform, rows[:, :2].T]))[: len(salts)]
    off = together - torch.eye(len(salts), together.shape[1])
    assert off.abs().max() < 5 / 64


@pytest.mark.parametrize("seed", [0, 3])
def test_bootstrap_weights_are_poisson_for_many_members(seed):
    rows = torch.rand(5 * 4000, 2)
    batch = TensorDict({"storage_index": fingerprint(rows)}, [len(rows)])
    weight = BootstrappedBatches(seed).assign(batch, 5)["weight"]
    assert weight.shape == (5, 4000)
    torch.testing.assert_close(weight.mean(-1), torch.ones(5), rtol=0, atol=0.08)
    torch.testing.assert_close(weight.var(-1), torch.ones(5), rtol=0, atol=0.15)


def test_rows_without_a_place_in_the_storage_cannot_be_bootstrapped():
    with pytest.raises(KeyError, match=r"'storage_index'.*index_key"):
        BootstrappedBatches().assign(TensorDict({"state": torch.zeros(8, 3)}, [8]), 2)
