"""Padding, as marked by TorchRL."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

__all__ = ["PADDING", "check_mask", "masks_of", "padding_mask", "until_padding"]

#: The mask below the trajectory ids of a collector, which is false for padding.
PADDING = ("collector", "mask")


def padding_mask(rows: TensorDictBase, key: NestedKey) -> Tensor | None:
    """Return the mask of ``rows [*B]`` that is false for padding, if there is one.

    TorchRL's ``split_trajectories`` writes it next to the trajectory ids: under ``"collector"``, or
    at the root for data without a collector.

    Args:
        rows: Transitions.
        key: Key of the mask. At the root, an entry of that name that is not bool or has more axes
            is ignored.

    Raises:
        ValueError: A mask of another dtype or shape.
    """
    mask = rows.get(key, None)
    if mask is None:
        named = rows.get(key[-1], None) if isinstance(key, tuple) else None
        if not isinstance(named, Tensor) or named.dtype != torch.bool:
            return None
        return named if named.shape == rows.batch_size else None
    check_mask(key, mask, rows.batch_size)
    return mask


def masks_of(rows: TensorDictBase, keys: Iterable[NestedKey]) -> dict[NestedKey, Tensor]:
    """Return the masks that ``rows [*B]`` have; the mask of padding is also found at the root.

    Args:
        rows: Transitions.
        keys: Of the masks, those that TorchRL's ``loss_mask_key`` names.
    """
    found: dict[NestedKey, Tensor] = {}
    for key in keys:
        mask = rows.get(key, None)
        if mask is None and key == PADDING:
            mask = padding_mask(rows, key)
        if mask is not None:
            found[key] = mask
    return found


def until_padding(
    rows: TensorDictBase, done: Tensor, keys: Iterable[NestedKey] = (PADDING,)
) -> Tensor:
    """Return ``done [*B, T, n]``, true also in the last step before padding.

    An episode cut off there may continue, but not in the following rows.

    Args:
        rows: ``[*B, T]``, in the order of time.
        done: Where episodes end.
        keys: Of the masks that are false for padding.

    Raises:
        ValueError: A mask of another dtype or shape.
    """
    for key, mask in masks_of(rows, keys).items():
        check_mask(key, mask, rows.batch_size)
        done = done.clone()
        done[..., :-1, :] |= mask.reshape(rows.shape)[..., 1:].logical_not().unsqueeze(-1)
    return done


def check_mask(key: NestedKey, mask: Tensor, batch: torch.Size) -> None:
    """Raise ``ValueError`` unless ``mask`` holds one bool for each row of ``batch``."""
    if mask.dtype != torch.bool or mask.shape.numel() != batch.numel():
        raise ValueError(
            f"{key!r} is {mask.dtype} {tuple(mask.shape)}, expected torch.bool {tuple(batch)}"
        )
