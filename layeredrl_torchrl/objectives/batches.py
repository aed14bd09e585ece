"""How the members of an ensemble share the transitions of a batch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from tensordict import TensorDictBase
from torch import Tensor

from layeredrl_torchrl._checks import check_positive_int, require

__all__ = [
    "BootstrappedBatches",
    "MemberBatches",
    "OwnBatches",
    "PartitionedBatch",
    "SharedBatch",
    "fingerprint",
    "hashed_uniform",
]


class MemberBatches(ABC):
    """Turns one sampled batch of transitions into a batch for each of ``M`` members.

    >>> batches = SharedBatch()
    >>> n_rows = batches.n_rows(batch_size=256, n_models=5)
    >>> batches.assign(TensorDict({"state": torch.zeros(n_rows, 3)}, [n_rows]), n_models=5).shape
    torch.Size([5, 256])
    """

    @abstractmethod
    def n_rows(self, batch_size: int, n_models: int) -> int:
        """Return how many transitions to sample for a batch size of ``batch_size``."""

    @abstractmethod
    def assign(self, batch: TensorDictBase, n_models: int) -> TensorDictBase:
        """Give the sampled transitions ``[R]`` to the members: ``[M, N]``.

        The transitions may come from several batches; the result is then split along ``N``.
        """


class OwnBatches(MemberBatches):
    """Gives every member its own ``batch_size`` transitions, drawn independently.

    >>> OwnBatches().n_rows(batch_size=256, n_models=5)
    1280
    """

    def n_rows(self, batch_size: int, n_models: int) -> int:
        """Return ``batch_size`` for each member."""
        return batch_size * n_models

    def assign(self, batch: TensorDictBase, n_models: int) -> TensorDictBase:
        """Cut the batch into equal parts."""
        return batch.reshape(n_models, -1)


class SharedBatch(MemberBatches):
    """Gives all members the same transitions; members differ only by their initial weights.

    >>> SharedBatch().assign(TensorDict({"state": torch.zeros(256, 3)}, [256]), n_models=5).shape
    torch.Size([5, 256])
    """

    def n_rows(self, batch_size: int, n_models: int) -> int:
        """Return ``batch_size``: one batch serves all members."""
        return batch_size

    def assign(self, batch: TensorDictBase, n_models: int) -> TensorDictBase:
        """Expand the batch, without a copy."""
        return batch.expand(n_models, *batch.batch_size)


class PartitionedBatch(MemberBatches):
    """Divides one batch among the members (LayeredRL's ``partition_batch``).

    >>> data = TensorDict({"state": torch.zeros(250, 3)}, [250])
    >>> PartitionedBatch().assign(data, n_models=5).shape
    torch.Size([5, 50])

    Raises:
        ValueError: A batch size that the number of members does not divide.
    """

    def n_rows(self, batch_size: int, n_models: int) -> int:
        """Return ``batch_size``, which the number of members must divide."""
        if batch_size % n_models:
            raise ValueError(
                f"model_batch_size is {batch_size}, which {n_models} members cannot share evenly; "
                f"take a multiple of {n_models}"
            )
        return batch_size

    def assign(self, batch: TensorDictBase, n_models: int) -> TensorDictBase:
        """Cut the batch into equal parts."""
        return batch.reshape(n_models, -1)


class BootstrappedBatches(OwnBatches):
    """Gives every member a bootstrap sample of the whole data, as in PETS (arXiv 1805.12114).

    A transition counts for a member as often as it was drawn into the member's resampled data set:
    Poisson(1) times, the limit of drawing with replacement (Oza and Russell, 2001). The count is a
    fixed function of member and place in the storage, so it needs no memory and stays the same
    while the buffer grows. It multiplies the entry ``"weight"``, which is 1 if missing.

    >>> data = TensorDict({"storage_index": torch.arange(20, 28)}, [8])
    >>> BootstrappedBatches().assign(data, n_models=2)["weight"]
    tensor([[1., 2., 0., 2.],
            [1., 2., 1., 0.]])

    Args:
        seed: Each seed gives another set of bootstrap samples.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = check_positive_int("seed", seed, minimum=0)

    def assign(self, batch: TensorDictBase, n_models: int) -> TensorDictBase:
        """Cut the batch into equal parts and weight them by ``"storage_index"``, int64 ``[R]``.

        Raises:
            KeyError: No ``"storage_index"``.
        """
        own = super().assign(batch, n_models)
        hint = "have it written by TransitionSlices(..., index_key='storage_index')"
        places = require(own, "storage_index", reader=type(self).__name__, hint=hint)
        uniform = torch.stack(
            [hashed_uniform(places[m], salt=(self.seed << 16) + m) for m in range(n_models)]
        )
        # P(count <= j) of Poisson(1); counts above 8 have a probability of 1e-6.
        edges = torch.tensor(
            [sum(math.exp(-1.0) / math.factorial(i) for i in range(j + 1)) for j in range(9)],
            device=uniform.device,
        )
        counts = (uniform.unsqueeze(-1) > edges).sum(-1).float()
        weight = own.get("weight", None)
        if weight is not None:
            counts = counts * weight.reshape(counts.shape)
        return own.set("weight", counts)


def fingerprint(*tensors: Tensor) -> Tensor:
    """Hash the content of each row, int64 ``[R]``.

    Multilinear hashing sums the values' bits times odd pseudo-random constants. This is several
    times cheaper than mixing each value.

    Args:
        *tensors: The parts of the rows, ``[R, *]`` each, of any dtype.
    """
    mixed = torch.ones(tensors[0].shape[0], dtype=torch.long, device=tensors[0].device)
    for tensor in tensors:
        rows = tensor.reshape(tensor.shape[0], -1)
        bits = (
            rows.float().contiguous().view(torch.int32)
            if rows.is_floating_point()
            else rows.to(torch.int32)
        ).long()
        factors = _mix_bits(_mix_bits(torch.arange(1, bits.shape[1] + 1, device=bits.device))) | 1
        mixed = _mix_bits(_mix_bits(mixed) + (bits * factors).sum(-1))
    return mixed


def hashed_uniform(fingerprints: Tensor, salt: int) -> Tensor:
    """Return numbers uniform in [0, 1), a fixed function of fingerprints ``[R]`` and ``salt``."""
    # Torch wraps products that overflow 64 bits, but refuses Python numbers beyond them.
    offset = (_MULTIPLIER * (salt + 1) + 2**63) % 2**64 - 2**63
    bits = _mix_bits(_mix_bits(fingerprints + offset))
    return ((bits >> 33) & (2**24 - 1)).float() / 2**24


_MULTIPLIER = 0x5851F42D4C957F2D


def _mix_bits(x: Tensor) -> Tensor:
    """Mix the bits by xor-shifts and products, so that few changed bits change all."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _MULTIPLIER
    return x ^ ((x >> 27) & (2**37 - 1))
