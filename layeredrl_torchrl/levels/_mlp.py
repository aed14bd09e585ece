"""Fully connected networks that run fast in TorchRL's losses."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["FlatMLP", "layers", "mlp"]


class FlatMLP(TensorDictModuleBase):
    """An MLP with ReLU that keeps all parameters ``weight_i`` and ``bias_i`` in one module.

    TorchRL's losses swap parameters into a network at every call, module by module; with one module
    per layer, this takes longer than the layers themselves.

    Args:
        in_keys: Entries to read and concatenate, ``[*B, n]`` each.
        out_keys: Entries to write.
        sizes: Widths, from the input to the output.
    """

    def __init__(
        self, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey], sizes: Sequence[int]
    ) -> None:
        super().__init__()
        self.in_keys, self.out_keys = list(in_keys), list(out_keys)
        self.n_layers = len(sizes) - 1
        for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
            linear = nn.Linear(n_in, n_out)
            self.register_parameter(f"weight_{i}", linear.weight)
            self.register_parameter(f"bias_{i}", linear.bias)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the output for ``[*B]``."""
        x = torch.cat([tensordict.get(key) for key in self.in_keys], -1)
        own = [
            (getattr(self, f"weight_{i}"), getattr(self, f"bias_{i}")) for i in range(self.n_layers)
        ]
        self.write(tensordict, mlp(x, own))
        return tensordict

    def write(self, tensordict: TensorDictBase, out: Tensor) -> None:
        """Write the last layer's output under ``out_keys``."""
        tensordict.set(self.out_keys[0], out)


def layers(params: TensorDictBase) -> list[tuple[Tensor, Tensor]]:
    """Return weight and bias of each layer of a :class:`FlatMLP` from its parameters."""
    n_layers = len(params.keys()) // 2
    return [(params.get(f"weight_{i}"), params.get(f"bias_{i}")) for i in range(n_layers)]


def mlp(x: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Evaluate linear layers with ReLU between them.

    Args:
        x: ``[*B, n]``; ``[N, n]`` for stacked layers.
        layers: Weight ``[m, n]`` and bias ``[m]`` of each layer; for ``S`` stacked networks
            ``[S, m, n]`` and ``[S, m]``.

    Returns:
        ``[*B, m]``, or ``[S, N, m]`` for stacked networks.
    """
    last = len(layers) - 1
    for i, (weight, bias) in enumerate(layers):
        if weight.ndim == 2:
            x = F.linear(x, weight, bias)
        else:
            x = x.expand(len(weight), *x.shape[-2:])
            x = torch.baddbmm(bias.unsqueeze(-2), x, weight.mT)
        if i < last:
            x = torch.relu(x)
    return x
