"""TorchRL's MLP in the form of this package's heads and policies."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torchrl.modules import MLP

__all__ = ["fully_connected"]


def fully_connected(
    in_features: int,
    out_features: int,
    hidden_sizes: Sequence[int],
    nonlinearity: type[nn.Module],
    layer_norm: bool,
) -> MLP:
    """Build an MLP, optionally with layer normalisation before each activation."""
    return MLP(
        in_features=in_features,
        out_features=out_features,
        num_cells=list(hidden_sizes),
        activation_class=nonlinearity,
        norm_class=nn.LayerNorm if layer_norm else None,
        norm_kwargs=[{"normalized_shape": n} for n in hidden_sizes] if layer_norm else None,
    )
