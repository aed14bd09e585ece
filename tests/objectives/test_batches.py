"""Which rows a member learns from, and numbers that are a fixed function of what a row holds."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from layeredrl_torchrl.objectives.batches import (
    BootstrappedBatches,
    OwnBatches,
    PartitionedBatch,
    SharedBatch,
    fingerprint,
    hashed_uniform,
)

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


@pytest.mark.parametrize(
    ("batches", "rows"),
    [
        # The rows of each of the three members, of a batch size of 6.
        (OwnBatches(), [range(6), range(6, 12), range(12, 18)]),
        (BootstrappedBatches(), [range(6), range(6, 12), range(12, 18)]),
        (SharedBatch(), [range(6)] * 3),
        (PartitionedBatch(), [range(2), range(2, 4), range(4, 6)]),
    ],
    ids=lambda x: type(x).__name__,
)
def test_each_member_gets_its_share_of_the_rows_that_are_asked_for(batches, rows):
    n_rows = batches.n_rows(batch_size=6, n_models=3)
    assert n_rows == len({row for member in rows for row in member})
    place = torch.arange(n_rows)
    given = TensorDict({"storage_index": place, "state": 2.0 * place.unsqueeze(-1)}, [n_rows])
    own = batches.assign(given, n_models=3)
    assert own["storage_index"].tolist() == [list(member) for member in rows]
    torch.testing.assert_close(own["state"].squeeze(-1), 2.0 * own["storage_index"])


@pytest.mark.parametrize("batch_size", [1, 5, 7])
def test_a_batch_that_cannot_be_divided_evenly_is_refused(batch_size):
    with pytest.raises(ValueError, match=rf"is {batch_size}, which 3 members .*multiple of 3"):
        PartitionedBatch().n_rows(batch_size, 3)
