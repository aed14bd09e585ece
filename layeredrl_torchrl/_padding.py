"""Where TorchRL says that steps are padding."""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

__all__ = ["check_mask", "padding_mask", "until_padding"]


def padding_mask(rows: TensorDictBase, key: NestedKey) -> Tensor | None:
    """Return the mask of ``rows [*B]`` that is false for padding, if there is one.

    TorchRL's ``split_trajectories`` writes it beside the trajectory ids: below ``"collector"``, or
    at the root of what no collector has yielded.

    Args:
        rows: Transitions.
        key: Its key. At the root, another entry of that name is none: of no bool, or of more axes.

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


def until_padding(rows: TensorDictBase, done: Tensor) -> Tensor:
    """Return ``done [*B, T, n]``, true also in the last step before padding.

    An episode that is cut off there goes on, but not in the rows that follow.

    Args:
        rows: ``[*B, T]``, in the order of time.
        done: Where episodes end.
    """
    mask = padding_mask(rows, ("collector", "mask"))
    if mask is None:
        return done
    done = done.clone()
    done[..., :-1, :] |= mask.reshape(rows.shape)[..., 1:].logical_not().unsqueeze(-1)
    return done


def check_mask(key: NestedKey, mask: Tensor, batch: torch.Size) -> None:
    """Raise ``ValueError`` unless ``mask`` are bools, one for each row of ``batch``."""
    if mask.dtype != torch.bool or mask.shape.numel() != batch.numel():
        raise ValueError(
            f"{key!r} is {mask.dtype} {tuple(mask.shape)}, expected torch.bool {tuple(batch)}"
        )
